"""Attention of a pass of which some KV is held elsewhere: what to ask for, and the merge of the answers with what is here.

For each KV head, the spans that a token sees are divided into aligned runs: those held elsewhere, and those between them. Every run
gives its node of the tree (`tree.py`), so the result has the bits that one holder of all KV gets.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from meshd.errors import LocalFault, ProtocolViolation
from meshd.kernels.attention.local import LocalAttention, in_host_memory
from meshd.kernels.attention.spans import attend_part
from meshd.kernels.attention.tree import F32, SPAN_TOKENS, Part, merge_runs, with_sinks
from meshd.kernels.backend import AttendRequest, AttentionRule, Projected, RemoteRun, Segment, row_slices
from meshd.kernels.kv.lease import ArenaLease
from meshd.kernels.threads import limit_torch_threads


def attend_for(lease: ArenaLease, request: AttendRequest) -> Part:
    """Answer a request, at the holder of its run: store the new rows, then compute the node of the run.

    lease: holds the run's positions, in its layers and of its KV heads only.
    Returns: o `[tokens, heads of the run, head_dim]` and lse `[tokens, heads]`; 0 and -inf for a token that sees none of the run.
    Raises: LocalFault if the run lacks rows that a token sees, or a new row is not finite.
    """
    limit_torch_threads()
    held, positions = in_host_memory(lease), request.run.positions
    before = min(request.rows_start, positions.stop)
    if held.end_of(request.layer) < before > positions.start:
        raise LocalFault(f"layer {request.layer} lacks rows before position {before} of the run that starts at {positions.start}")
    if len(request.k):
        held.write(request.layer, request.rows_start, request.k, request.v)
    k, v = held.read(request.layer, min(request.start + len(request.q), positions.stop))
    own = slice(positions.start, positions.stop)
    return attend_part(request.q, k[own], v[own], request.start, request.rule, request.run.spans.start)


def remote_requests(
    layer: int, projected: Projected, segments: Sequence[Segment], dropped: Collection[int]
) -> tuple[AttendRequest, ...]:
    """List what has to be asked for in a layer. Runs of which no token sees a key are not asked.

    dropped: numbers of segments that are computed no further.
    Raises: LocalFault if what would be sent is not finite.
    """
    return tuple(
        _request(number, layer, projected, segment, rows, run)
        for number, (segment, rows) in enumerate(zip(segments, _rows(segments), strict=True))
        if number not in dropped
        for run in segment.remote
        if layer in run.layers and _sees(segment, run, projected.rule.window)
    )


def check_part(request: AttendRequest, part: Part | None) -> None:
    """Check the answer to a request. Raises: ProtocolViolation if it is none: its shapes are others, or a value is not finite."""
    shape = request.q.shape
    if part is None or part[0].shape != shape or part[1].shape != shape[:2]:
        raise ProtocolViolation(f"a part of the attention of layer {request.layer} has another shape than {shape}")
    o, lse = part
    if not np.isfinite(o).all() or not (np.isfinite(lse) | np.isneginf(lse)).all():
        raise ProtocolViolation(f"a part of the attention of layer {request.layer} is not finite")


def merge_attention(
    layer: int,
    projected: Projected,
    segments: Sequence[Segment],
    requests: Sequence[AttendRequest],
    parts: Sequence[Part | None],
    dropped: Collection[int],
    local: LocalAttention,
) -> F32:
    """Store the new K and V that belong here, and compute the attention of a layer from what is here and from `parts`.

    `parts` answer `requests`. Segments without a request have everything here. Returns: `[tokens, heads, head_dim]`, 0 for segments
    that were dropped.
    """
    out = np.zeros_like(projected.q)
    for number, (segment, rows) in enumerate(zip(segments, _rows(segments), strict=True)):
        if number in dropped:
            continue
        pairs = zip(requests, parts, strict=True)
        answers = [(request.run, part) for request, part in pairs if request.segment == number and part is not None]
        own = replace(projected, q=projected.q[rows], k=projected.k[rows], v=projected.v[rows], residual=None)
        out[rows] = _merged(layer, own, segment, answers) if answers else local(layer, own, [segment])
    return out


def _rows(segments: Sequence[Segment]) -> list[slice]:
    return row_slices(segment.tokens for segment in segments)


def _sees(segment: Segment, run: RemoteRun, window: int) -> bool:
    """Whether a token of the segment sees a key of the run."""
    return run.positions.start < segment.end and run.positions.stop > _first_seen(segment, window)


def _first_seen(segment: Segment, window: int) -> int:
    return max(0, segment.start - window + 1) if window else 0


def _request(number: int, layer: int, projected: Projected, segment: Segment, rows: slice, run: RemoteRun) -> AttendRequest:
    kv_heads = projected.k.shape[1]
    first, last = run.kv_heads or (0, kv_heads)
    if not 0 <= first < last <= kv_heads:
        raise LocalFault(f"KV heads {first} to {last - 1} are not of this model, which has {kv_heads}")
    group = projected.q.shape[1] // kv_heads
    new = slice(*(rows.start + min(max(at - segment.start, 0), segment.tokens) for at in (run.positions.start, run.positions.stop)))
    q = np.ascontiguousarray(projected.q[rows, first * group : last * group])
    k, v = (np.ascontiguousarray(part[new, first:last]) for part in (projected.k, projected.v))
    if not all(np.isfinite(part).all() for part in (q, k, v)):
        raise LocalFault(f"layer {layer} can't compute position {segment.start}: its Q, K or V is not finite")
    return AttendRequest(number, run, layer, segment.start, q, k, v, replace(projected.rule, sinks=None))


def _merged(layer: int, own: Projected, segment: Segment, answers: Sequence[tuple[RemoteRun, Part]]) -> F32:
    """Compute the attention of one segment, head group by head group: within a group, all heads have the same runs elsewhere."""
    kv_heads, group, rule = own.k.shape[1], own.q.shape[1] // own.k.shape[1], own.rule
    ranges = [run.kv_heads or (0, kv_heads) for run, _ in answers]
    k, v = _store(layer, own, segment, [run for (run, _), heads in zip(answers, ranges, strict=True) if heads == (0, kv_heads)])
    out = np.empty_like(own.q)
    for first, last in pairwise(sorted({0, kv_heads, *(edge for heads in ranges for edge in heads)})):
        heads = slice(first * group, last * group)
        nodes: list[tuple[range, Part]] = []
        for (run, (o, lse)), (begin, end) in zip(answers, ranges, strict=True):
            if begin <= first and last <= end:
                some = slice((first - begin) * group, (last - begin) * group)
                nodes.append((run.spans, (o[:, some], lse[:, some])))
        for spans in _between([run for run, _ in nodes], segment, rule):
            keys = slice(spans.start * SPAN_TOKENS, spans.stop * SPAN_TOKENS)
            part = attend_part(own.q[:, heads], k[keys, first:last], v[keys, first:last], segment.start, rule, spans.start)
            nodes.append((spans, part))
        node = merge_runs(nodes)
        out[:, heads] = node[0] if rule.sinks is None else with_sinks(node, rule.sinks[heads])
    return out


def _store(layer: int, own: Projected, segment: Segment, elsewhere: Sequence[RemoteRun]) -> tuple[F32, ...]:
    """Store the new rows that are not elsewhere with all KV heads. Returns: K and V of the lease."""
    lease, at = in_host_memory(segment.lease), segment.start
    for start, stop in (*sorted((run.positions.start, run.positions.stop) for run in elsewhere), (segment.end, segment.end)):
        if at < (end := min(start, segment.end)):
            rows = slice(at - segment.start, end - segment.start)
            lease.write(layer, at, own.k[rows], own.v[rows])
        at = max(at, stop)
    return lease.read(layer, segment.end)


def _between(elsewhere: Sequence[range], segment: Segment, rule: AttentionRule) -> Iterator[range]:
    """Divide the spans that the segment sees and that are not `elsewhere` into aligned runs."""
    begin, last = _first_seen(segment, rule.window) // SPAN_TOKENS, -(-segment.end // SPAN_TOKENS)
    for run in (*sorted(elsewhere, key=lambda spans: spans.start), range(last, last)):
        while begin < min(run.start, last):
            size = begin & -begin or 1 << (last - 1).bit_length()
            while begin + size > min(run.start, last):
                size //= 2
            yield range(begin, begin + size)
            begin += size
        begin = max(begin, run.stop)
