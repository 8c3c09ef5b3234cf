"""Predict the memory that a stage takes, and compute the memory that its peer has for it.

Pipette (Yim et al., 2024) trains a neural network to estimate memory. This module adds up known parts: weights, KV, the activations
of one prefill chunk and a constant for the backend. A reserve covers the rest.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.types import AttentionShard, ModelCard, StagePlan

RESERVE = 0.10
"""Share of a peer's free memory that no plan takes. It covers allocator slack and other programs on the device."""
RUNTIME_BASE_BYTES = 64 << 20
"""Memory for a backend's buffers and threads, whatever layers it has loaded."""

UNKNOWN_BITS = 32.0
"""Bits of a weight of a kind that a peer's backend does not name: as many as any takes."""


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one peer, by purpose."""

    layers_bytes: int = 0
    embedding_bytes: int = 0
    head_bytes: int = 0
    kv_bytes: int = 0
    working_bytes: int = 0
    """Activations of one prefill chunk and, on the last stage, the logits."""
    runtime_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field) for field in self.__struct_fields__)

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        return MemoryUse(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


def stage_memory(problem: PlanInput, stage: StagePlan) -> MemoryUse:
    """Predict the memory of a stage on its own peer. KV that its attention shards hold on other peers is not counted.

    Raises: NoPeer if the peer has no profile.
    """
    card, layers, bits = problem.card, stage.layers, problem.profile(stage.peer).weight_bits
    first, last = layers.start == 0, layers.end == card.spec.layers
    elsewhere = sum(shard_kv_bytes(problem, shard) for shard in stage.attention if shard.peer != stage.peer)
    return MemoryUse(
        layers_bytes=int(_layer_bytes(card, bits)[layers.start : layers.end].sum()),
        embedding_bytes=card.embedding_bytes if first else 0,
        head_bytes=_head_bytes(card, bits, shared=first) if last else 0,
        kv_bytes=problem.kv_token_layer_bytes * problem.context * len(layers) - elsewhere,
        working_bytes=_working_bytes(problem, last),
        runtime_bytes=RUNTIME_BASE_BYTES,
    )


def shard_kv_bytes(problem: PlanInput, shard: AttentionShard) -> int:
    """Return the bytes of KV that an attention shard holds at the full context."""
    spec = problem.card.spec
    first_head, last_head = shard.kv_heads or (0, spec.kv_heads)
    first, last = shard.tokens or (0, problem.context)
    per_head = problem.kv_token_layer_bytes // spec.kv_heads
    return len(shard.layers) * (last_head - first_head) * max(0, min(last, problem.context) - first) * per_head


def memory_table(problem: PlanInput, profile: PeerProfile) -> NDArray[np.float64]:
    """Predict the bytes that each run of layers `[a, b)` takes on a peer, as `stage_memory` does.

    Returns: bytes, `[layers + 1, layers + 1]`; inf where b <= a.
    """
    card, count, bits = problem.card, problem.card.spec.layers, profile.weight_bits
    per_layer = _layer_bytes(card, bits) + problem.kv_token_layer_bytes * problem.context
    total = np.concatenate(([0.0], np.cumsum(per_layer)))
    table = total[None, :] - total[:, None] + _working_bytes(problem, last=False) + RUNTIME_BASE_BYTES
    head = _head_bytes(card, bits, shared=False)
    table[0, :] += card.embedding_bytes
    table[:, count] += head + _working_bytes(problem, last=True) - _working_bytes(problem, last=False)
    table[0, count] -= head - _head_bytes(card, bits, shared=True)
    table[np.tril_indices(count + 1)] = np.inf
    return table


def memory_tables(problem: PlanInput, peers: Sequence[PeerProfile]) -> NDArray[np.float64]:
    """Return the `memory_table` of each peer. Peers of the same backend share one. Returns: `[peers, layers + 1, layers + 1]`."""
    tables: dict[tuple[tuple[str, float], ...], NDArray[np.float64]] = {}
    rows = []
    for peer in peers:
        key = tuple(sorted(peer.weight_bits.items()))
        if key not in tables:
            tables[key] = memory_table(problem, peer)
        rows.append(tables[key])
    return np.stack(rows)


def capacity_bytes(problem: PlanInput, profile: PeerProfile) -> int:
    """Return the peer's free memory plus the memory of those of its holdings of this model that a plan may reuse or replace.

    A route over resident layers reuses all usable holdings. A new placement replaces only usable holdings without sessions.
    """
    reused = [item for item in profile.usable_holdings if problem.resident_only or item.kv_tokens_free == item.kv_tokens_total]
    per_token_layer = problem.kv_token_layer_bytes
    reused_bytes = sum(item.weight_bytes + item.kv_tokens_total * len(item.layers) * per_token_layer for item in reused)
    return max(0, profile.memory_free_bytes + reused_bytes)


def allowed_bytes(problem: PlanInput, profile: PeerProfile) -> float:
    """Return the bytes that a plan may take on a peer: its capacity less the reserve."""
    return capacity_bytes(problem, profile) * (1 - RESERVE)


def missing_bytes(used_bytes: float, capacity: float) -> int:
    """Return the bytes of free memory that a peer lacks for `used_bytes` and the reserve; 0 if it lacks none."""
    return max(0, math.ceil(used_bytes / (1 - RESERVE) - capacity))


def _layer_bytes(card: ModelCard, weight_bits: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the whole bytes that each layer's weights take: `[layers]`."""
    if not weight_bits or not card.layer_weights:
        return np.asarray(card.layer_bytes, dtype=np.float64)
    counts = np.asarray(list(card.layer_weights.values()), dtype=np.float64)  # [kinds, layers]
    bits = np.array([weight_bits.get(kind, UNKNOWN_BITS) for kind in card.layer_weights])
    sizes: NDArray[np.float64] = np.ceil(bits @ counts / 8)
    return sizes


def _head_bytes(card: ModelCard, weight_bits: Mapping[str, float], *, shared: bool) -> int:
    """Return the bytes of the head. A tied head shares the embedding's table if both are on one stage (`shared`)."""
    size = card.head_bytes
    if weight_bits and card.head_weights:
        size = math.ceil(sum(count * weight_bits.get(kind, UNKNOWN_BITS) for kind, count in card.head_weights.items()) / 8)
    return max(0, size - card.embedding_bytes) if shared and card.spec.tied_head else size


def _working_bytes(problem: PlanInput, last: bool) -> int:
    """Return the bytes of a prefill chunk's f32 activations and, on the `last` stage, of one token's logits.

    The activations of a token: three hidden vectors, such as residual and norm; q, k, v and the attention output; gate, up and
    their product.
    """
    spec = problem.card.spec
    heads = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    per_token = 3 * spec.hidden + heads + 3 * spec.ffn
    return 4 * (problem.chunk_tokens * per_token + (spec.vocab if last else 0))
