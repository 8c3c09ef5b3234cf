"""Predict the times of a plan's parts from measured rates.

Sources: times of a layer follow GenZ (Bambhaniya et al., 2024), written out for a Llama-style block. The pipeline of prefill chunks
follows Pipette (Yim et al., 2024). The traffic of attention shards follows Lamina (Chen et al., 2024, arXiv 2405.01814).

If a peer has measured a time on its own layers, that time replaces the one derived from its rates. Both are multiplied by the
peer's factors, which it learns from real steps (`learn.py`). The embedding is assumed to take no time, since it reads only one row
per token.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from meshd.planner.network import Network
from meshd.planner.profile import PeerProfile
from meshd.types import AttentionShard, ModelCard, ModelSpec

TOKEN_MESSAGE_BYTES = 64
"""Size of the message that carries a token from the last stage to the first."""

Seconds = NDArray[np.float64]


def block_parameters(spec: ModelSpec) -> int:
    """Count the weights of a block that one token uses: q, k, v, o, and the three matrices of the MLP or of each expert in use."""
    return _attention_parameters(spec) + 3 * spec.hidden * spec.ffn * (spec.experts_used or 1)


def active_weight_share(spec: ModelSpec) -> float:
    """Return the share of a block's weights that one token uses: 1 unless the block has experts."""
    every = _attention_parameters(spec) + 3 * spec.hidden * spec.ffn * (spec.experts or 1)
    return block_parameters(spec) / every


def _attention_parameters(spec: ModelSpec) -> int:
    d, h = spec.hidden, spec.head_dim
    return 2 * d * spec.heads * h + 2 * d * spec.kv_heads * h


def project_share(spec: ModelSpec) -> float:
    """Return the share of q, k and v, which come before attention, in the weights of a block that one token uses."""
    return spec.hidden * (spec.heads + 2 * spec.kv_heads) * spec.head_dim / block_parameters(spec)


def layer_decode_s(profile: PeerProfile, card: ModelCard) -> Seconds:
    """Predict the time of each layer for one token of decoding, without attention. Returns: seconds, `[layers]`."""
    if profile.layer_decode_s is not None:
        return np.full(card.spec.layers, profile.layer_decode_s * profile.decode_factor)
    weights = np.asarray(card.layer_bytes, dtype=np.float64) * active_weight_share(card.spec)
    return (weights / profile.rates.decode_bytes_s + profile.rates.layer_overhead_s) * profile.decode_factor


def attention_decode_s(profile: PeerProfile, positions: float, kv_token_layer_bytes: int) -> float:
    """Predict one token's attention in one layer over the KV of `positions` tokens, in seconds."""
    token_s = profile.attention_token_s or kv_token_layer_bytes / profile.rates.attention_bytes_s
    return positions * token_s * profile.decode_factor


def layer_prefill_s(profile: PeerProfile, card: ModelCard, chunk: int, first: float) -> Seconds:
    """Predict the time of each layer for a prefill chunk of `chunk` tokens after `first` earlier tokens, attention included.

    Returns: seconds, `[layers]`.
    """
    spec, rates = card.spec, profile.rates
    pair_s = profile.attention_pair_s or 4 * spec.heads * spec.head_dim / rates.prefill_flops_s
    attention = chunk * (first + (chunk + 1) / 2) * pair_s
    if profile.layer_prefill_s is not None:
        return np.full(spec.layers, (chunk * profile.layer_prefill_s + attention) * profile.prefill_factor)
    compute = 2 * chunk * np.asarray(card.layer_parameters, dtype=np.float64) / rates.prefill_flops_s
    memory = np.asarray(card.layer_bytes, dtype=np.float64) / rates.decode_bytes_s
    return (np.maximum(compute, memory) + attention + rates.layer_overhead_s) * profile.prefill_factor


def head_s(profile: PeerProfile, card: ModelCard) -> float:
    """Predict the time of final norm, head and sampler for one token, in seconds."""
    derived = card.head_bytes / profile.rates.decode_bytes_s + profile.rates.layer_overhead_s
    return (profile.head_s or derived) * profile.decode_factor


def chunking(prompt_tokens: int, chunk_tokens: int) -> tuple[int, float]:
    """Split a prompt into chunks.

    Returns: (tokens per chunk, number of chunks). The number is at least 1, and fractional if the last chunk is shorter.
    """
    chunk = max(1, min(prompt_tokens, chunk_tokens))
    return chunk, max(1.0, prompt_tokens / chunk)


def pipelined_s(terms: Iterable[float], periods: Iterable[float], chunks: float) -> float:
    """Predict the time of `chunks` equal chunks through a pipeline of stages and links, in seconds.

    The first chunk takes the sum of `terms`, its times at all stages and links. Each further chunk adds the largest of `periods`.
    """
    return sum(terms) + (chunks - 1) * max(periods)


def shard_fraction(shard: AttentionShard, spec: ModelSpec, position: int) -> float:
    """Return the share of a layer's KV that the shard holds when the session has `position` tokens, from 0 to 1."""
    first_head, last_head = shard.kv_heads or (0, spec.kv_heads)
    first, last = shard.tokens or (0, position)
    tokens = max(0, min(last, position) - first)
    return (last_head - first_head) / spec.kv_heads * (tokens / position if position else 0.0)


def shard_wire_bytes(shard: AttentionShard, spec: ModelSpec, element_bytes: int) -> tuple[int, int]:
    """Count the bytes that one token sends to a shard and back in one layer.

    The message to the shard has q, k and v. The message back has the partial output and its log-sum-exp in f32. Without the
    log-sum-exp, both messages together have Lamina's (2 + 2/G)·e·d bytes, where G is the number of query heads per KV head, e the
    number of bytes per element, and d the total width of the shard's query heads.

    Returns: (bytes to the shard, bytes back).
    """
    first_head, last_head = shard.kv_heads or (0, spec.kv_heads)
    kv_heads = last_head - first_head
    heads = kv_heads * (spec.heads // spec.kv_heads)
    return (heads + 2 * kv_heads) * spec.head_dim * element_bytes, heads * (spec.head_dim * element_bytes + 4)


def shard_decode_s(
    shard: AttentionShard,
    owner: PeerProfile,
    holder: PeerProfile,
    network: Network,
    spec: ModelSpec,
    position: int,
    kv_token_layer_bytes: int,
    wire_element_bytes: int,
) -> float:
    """Predict one token's attention in one layer on a shard's peer, round trip included, in seconds.

    `owner` computes the stage, and `holder` has the shard.
    """
    there, back = shard_wire_bytes(shard, spec, wire_element_bytes)
    wire = network.hop_s(owner.id, holder.id, there) + network.hop_s(holder.id, owner.id, back)
    return wire + attention_decode_s(holder, shard_fraction(shard, spec, position) * position, kv_token_layer_bytes)
