"""Check that the attention shards of a stage cover its KV exactly once."""

from collections.abc import Iterable
from itertools import pairwise, product

from meshd.errors import InvalidRequest
from meshd.types import ModelSpec, StagePlan

Span = tuple[int, int]
"""A range `[first, last)` of KV heads or of tokens."""


def check_shards(stage: StagePlan, spec: ModelSpec, context: int) -> None:
    """Check that the shards of each layer cover its heads and tokens exactly once.

    A layer without shards has all its KV on the stage's own peer.

    Raises: InvalidRequest if they do not.
    """
    for shard in stage.attention:
        if shard.layers not in stage.layers:
            raise unsound_plan(f"attention layers {shard.layers} are not in the stage's layers {stage.layers}")
    for layer in sorted({layer for shard in stage.attention for layer in shard.layers}):
        parts = [(shard.kv_heads, shard.tokens) for shard in stage.attention if layer in shard.layers]
        check_tiling(parts, spec.kv_heads, context, layer)


def check_tiling(parts: Iterable[tuple[Span | None, Span | None]], kv_heads: int, context: int, layer: int) -> None:
    """Check that `parts` cover one layer's attention exactly once. A part is (KV heads, tokens), where None means all.

    Raises: InvalidRequest.
    """
    tiles = [(heads or (0, kv_heads), tokens or (0, context)) for heads, tokens in parts]
    for (first_head, last_head), (first, last) in tiles:
        if not (0 <= first_head < last_head <= kv_heads and 0 <= first < last <= context):
            raise unsound_plan(f"layer {layer}'s attention has a part outside its {kv_heads} KV heads and {context} tokens")
    head_cuts = sorted({0, kv_heads, *(head for heads, _ in tiles for head in heads)})
    token_cuts = sorted({0, context, *(token for _, tokens in tiles for token in tokens)})
    for (head, _), (token, _) in product(pairwise(head_cuts), pairwise(token_cuts)):
        owners = sum(heads[0] <= head < heads[1] and tokens[0] <= token < tokens[1] for heads, tokens in tiles)
        if owners != 1:
            what = "covered by no part" if owners == 0 else f"covered {owners} times"
            raise unsound_plan(f"layer {layer}'s attention: KV head {head} from token {token} on is {what}")


def unsound_plan(message: str) -> InvalidRequest:
    """Make the error for stages or a DAG that break a rule of plans."""
    return InvalidRequest(f"this plan is not sound: {message}", param="attention")
