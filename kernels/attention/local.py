"""The attention of a stage whose own peer holds all of its KV."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from meshd.errors import LocalFault
from meshd.kernels.attention.kernel import block_tokens
from meshd.kernels.attention.spans import attend, attend_tokens
from meshd.kernels.attention.tree import F32
from meshd.kernels.backend import AttentionRule, Projected, Segment
from meshd.kernels.kv.lease import ArenaLease, HostLease, write_rows
from meshd.kernels.threads import Workers

PARALLEL_WORK = 4 << 20
"""Query elements times keys, below which a second thread costs more (0.1 to 0.2 ms for the hand-over) than it saves."""


class _Part(NamedTuple):
    """A segment's rows of the batch, and the K and V that they see, `[keys, kv_heads, head_dim]` each."""

    row: int
    start: int
    tokens: int
    k: F32
    v: F32


class LocalAttention:
    """The `Attend` function of a stage whose own peer holds all of its KV."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def __call__(self, layer: int, projected: Projected, segments: Sequence[Segment]) -> F32:
        """Store the segments' new K and V, then attend over each segment's keys up to each token."""
        places = [(in_host_memory(segment.lease), segment.start, segment.tokens) for segment in segments]
        write_rows(layer, places, projected.k, projected.v)
        parts = _parts(layer, places)
        q, rule = projected.q, projected.rule
        singles = [part for part in parts if part.tokens == 1]
        if len(singles) == len(parts):
            return self._attend_singles(q, singles, rule)
        out = np.empty_like(q)
        if singles:
            rows = [part.row for part in singles]
            out[rows] = self._attend_singles(q[rows], singles, rule)
        for part in parts:
            if part.tokens > 1:
                own = slice(part.row, part.row + part.tokens)
                out[own] = self._attend(q[own], part.k, part.v, part.start, rule)
        return out

    def _attend_singles(self, q: F32, parts: Sequence[_Part], rule: AttentionRule) -> F32:
        """Compute attention of segments of one token each, on several threads if the work is large, with the same result."""

        def some(own: slice) -> F32:
            return attend_tokens(q[own], [(part.k, part.v) for part in parts[own]], [part.start for part in parts[own]], rule)

        threads = min(self._workers.threads, len(parts))
        if threads == 1 or q[0].size * sum(len(part.k) for part in parts) < PARALLEL_WORK:
            return some(slice(None))
        return np.concatenate(self._workers.map(some, _shares(len(parts), threads)))

    def _attend(self, q: F32, k: F32, v: F32, start: int, rule: AttentionRule) -> F32:
        """Compute attention of one segment, on several threads if the work is large, with the same result.

        Each thread gets as many rows, if each then has a full block of them at least; otherwise, KV heads: a smaller block takes
        almost as long as a full one.
        """
        threads = self._workers.threads
        if threads == 1 or q.size * len(k) < PARALLEL_WORK:
            return attend(q, k, v, start, rule)
        tokens, heads, kv_heads = len(q), q.shape[1], k.shape[1]
        group = heads // kv_heads

        def rows(own: slice) -> F32:
            return attend(q[own], k, v, start + own.start, rule)

        def some_heads(kv: slice) -> F32:
            own = slice(kv.start * group, kv.stop * group)
            sinks = rule if rule.sinks is None else replace(rule, sinks=rule.sinks[own])
            return attend(q[:, own], k[:, kv], v[:, kv], start, sinks)

        if tokens >= threads * block_tokens(group):
            return np.concatenate(self._workers.map(rows, _shares(tokens, threads)))
        return np.concatenate(self._workers.map(some_heads, _shares(kv_heads, min(threads, kv_heads))), axis=1)


def _shares(size: int, count: int) -> list[slice]:
    """Divide `range(size)` into slices of about equal length."""
    return [slice(*cut) for cut in pairwise(size * index // count for index in range(count + 1))]


def _parts(layer: int, places: Sequence[tuple[HostLease, int, int]]) -> list[_Part]:
    parts: list[_Part] = []
    row = 0
    for lease, start, tokens in places:
        parts.append(_Part(row, start, tokens, *lease.read(layer, start + tokens)))
        row += tokens
    return parts


def in_host_memory(lease: ArenaLease) -> HostLease:
    """Raises: LocalFault for KV that another backend's arena holds."""
    if not isinstance(lease, HostLease):
        raise LocalFault("this backend computes attention in host memory, and the KV is elsewhere")
    return lease
