"""Attention over spans: which keys each token reads in which call, and the attention of a chunk of tokens.

A token's part over a span that lies wholly behind it and within its window is computed over the whole span, in one call for all
such spans. In the last, open span it attends to the keys up to its own, in the span where its window begins to the keys from there
on; of these two spans a call reads whole steps of `KEY_STEP` keys, and masks what a token does not see. So the keys that are read
for a token depend on its position and the window only, and its result is the same, bit for bit, in any chunk, and for any holder
of the span.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise

import numpy as np

from meshd.errors import LocalFault
from meshd.kernels.attention.kernel import KEY_STEP, Held, attend_each, attend_keys
from meshd.kernels.attention.tree import F32, SPAN_TOKENS, Part, merge_nodes, merge_runs, with_sinks
from meshd.kernels.backend import PLAIN, AttentionRule

MERGE_FLOATS = 4 << 20
"""Maximum number of floats in the parts that are merged at once: 16 MiB. A chunk of 128 tokens with 32 heads of 64 has 16 spans in
one merge, and a decode step 2,048. More spans are merged run by run, so that memory does not grow with the context."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the kernel: the tokens `rows` of a chunk and the keys `keys` of those held, which make the nodes `nodes`."""

    rows: slice
    nodes: slice
    keys: slice
    first: int | None
    """Index of the first token among the keys; None if all tokens attend to all keys."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The spans `[first, first + count)`, all within one aligned run, and the calls that make their parts."""

    first: int
    count: int
    calls: tuple[_Call, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Tokens of a chunk that see parts of the same spans."""

    rows: slice
    runs: tuple[_Run, ...]


def attend(q: F32, k: F32, v: F32, start: int, rule: AttentionRule = PLAIN, span: int = SPAN_TOKENS) -> F32:
    """Compute attention of each token to the keys up to its own, with the rule's sinks. Arguments as in `attend_part`.

    Returns: o `[tokens, heads, head_dim]`.
    """
    part = attend_part(q, k, v, start, rule, span=span)
    return part[0] if rule.sinks is None else with_sinks(part, rule.sinks)


def attend_tokens(
    q: F32, kv: Sequence[tuple[F32, F32]], positions: Sequence[int], rule: AttentionRule = PLAIN, span: int = SPAN_TOKENS
) -> F32:
    """Compute attention of single tokens of several sessions, as `attend` does for each of them.

    Token i of `q` `[tokens, heads, head_dim]` is at `positions[i]`; `kv[i]` has its K and V, `[keys, kv_heads, head_dim]` each.

    Returns: o `[tokens, heads, head_dim]`.
    """
    run = _spans_at_once(q[0].size)
    alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    """Tokens whose parts are merged in the same way."""
    held: list[Sequence[Held]] = []
    for index, (k, v) in enumerate(kv):
        spans = _token_run(positions[index], rule.window, len(k), span, run)
        held.append([Held(_ranges(k, call), _ranges(v, call), call.first) for call in spans.calls] if spans else ())
        alike[(spans.first, spans.count) if spans and spans.count > 1 else (0, spans is not None)].append(index)
    if len(alike) == 1 and held[0]:
        return _attend_alike(q, held, next(iter(alike))[0], rule)
    out = np.empty_like(q)
    for (first, _), own in alike.items():
        if held[own[0]]:
            out[own] = _attend_alike(q[own], [held[index] for index in own], first, rule)
        else:
            for index in own:
                out[index] = attend(q[index : index + 1], *kv[index], positions[index], rule, span)[0]
    return out


def _attend_alike(q: F32, held: Sequence[Sequence[Held]], first: int, rule: AttentionRule) -> F32:
    part = merge_nodes(*attend_each(q, held, rule), first)
    return part[0] if rule.sinks is None else with_sinks(part, rule.sinks)


def _ranges(rows: F32, call: _Call) -> F32:
    return rows[call.keys].reshape(call.nodes.stop - call.nodes.start, -1, *rows.shape[1:])  # a view


@lru_cache(maxsize=256)
def _token_run(position: int, window: int, held: int, span: int, run: int) -> _Run | None:
    """Return the calls for a single token, ordered by span; None if there are more spans than are merged at once."""
    runs = _groups(position, 1, window, 0, held, span, run)[0].runs
    return replace(runs[0], calls=tuple(sorted(runs[0].calls, key=lambda call: call.nodes.start))) if len(runs) == 1 else None


def attend_part(
    q: F32, k: F32, v: F32, start: int, rule: AttentionRule = PLAIN, first_span: int = 0, span: int = SPAN_TOKENS
) -> Part:
    """Compute the node of the tree over the spans held: an aligned run, or all spans that the tokens see.

    Token i of `q` `[tokens, heads, head_dim]` is at position `start + i`. `k` and `v` `[keys, kv_heads, head_dim]` hold positions
    from the start of span `first_span` on, as far as the tokens see; keys that no token sees must be finite. The rule's sinks are
    not applied.

    Returns: o and lse; 0 and -inf for a token that sees none of these spans.
    Raises: LocalFault if a key is not held that a token sees: one before its own in a span of which some key is held.
    """
    tokens, heads, head_dim = q.shape
    run = _spans_at_once(tokens * heads * head_dim)
    groups = _groups(start, tokens, rule.window, first_span, len(k), span, run)
    parts = [_attend_group(q[group.rows], k, v, group, rule, run) for group in groups]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([o for o, _ in parts]), np.concatenate([lse for _, lse in parts])


def _spans_at_once(floats: int) -> int:
    """Return how many spans are merged at once: a power of two, so that they are an aligned run. A part of a span has `floats`."""
    return 1 << max(0, (MERGE_FLOATS // max(floats, 1)).bit_length() - 1)


def _attend_group(q: F32, k: F32, v: F32, group: _Group, rule: AttentionRule, run: int) -> Part:
    parts: list[tuple[range, Part]] = []
    for spans in group.runs:
        begin = spans.first // run * run
        parts.append((range(begin, begin + run), _attend_run(q, k, v, spans, rule)))
    if not parts:
        return np.zeros(q.shape, np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    return parts[0][1] if len(parts) == 1 else merge_runs(parts)


def _attend_run(q: F32, k: F32, v: F32, run: _Run, rule: AttentionRule) -> Part:
    o, lse = np.empty((run.count, *q.shape), np.float32), np.empty((run.count, *q.shape[:2]), np.float32)
    for call in run.calls:
        out = o[call.nodes, call.rows], lse[call.nodes, call.rows]
        attend_keys(q[call.rows], _ranges(k, call), _ranges(v, call), call.first, rule, out)
    return merge_nodes(o, lse, run.first)


@lru_cache(maxsize=256)
def _groups(start: int, tokens: int, window: int, first_span: int, held: int, span: int, run: int) -> tuple[_Group, ...]:
    """Divide a chunk of tokens into groups that see parts of the same spans. Cached, since the layers of a step ask for the same.

    `held` is the number of keys from the first of span `first_span` on; parts of `run` spans are merged at once.
    """

    def seen(position: int) -> tuple[int, int, bool]:
        """Return the first and the last span that a token sees, and whether its window begins behind position 0."""
        return max(0, position - window + 1) // span if window else 0, position // span, 0 < window <= position

    groups: list[_Group] = []
    base, held_end = first_span * span, first_span * span + held
    for (first, last, cut), positions in groupby(range(start, start + tokens), seen):
        members = list(positions)
        own = range(members[0], members[-1] + 1)
        begin, end = max(first, first_span), min(last + 1, -(-held_end // span))
        if end > begin and held_end < min(end * span, own.stop):
            raise LocalFault(f"the token at position {own.stop - 1} sees keys that are not held: they end at {held_end}")
        runs: list[_Run] = []
        for some in _aligned(begin, end, run):
            calls: list[_Call] = []
            whole = range(max(some.start, first + cut), min(some.stop, last))
            for index in some:
                if index not in whole:
                    low = window if index == first and cut else 0
                    calls += _open_calls(own, index, low, span, some.start, base, held_end)
            if whole:
                keys = slice(whole.start * span - base, whole.stop * span - base)
                calls.append(_Call(slice(None), slice(whole.start - some.start, whole.stop - some.start), keys, None))
            runs.append(_Run(some.start, len(some), tuple(calls)))
        groups.append(_Group(slice(own.start - start, own.stop - start), tuple(runs)))
    return tuple(groups)


def _aligned(begin: int, end: int, size: int) -> Iterator[range]:
    """Divide the spans `[begin, end)` at every multiple of `size`."""
    if begin < end:
        for some in pairwise([begin, *range(begin - begin % size + size, end, size), end]):
            yield range(*some)


def _open_calls(own: range, index: int, window: int, span: int, first: int, base: int, held_end: int) -> Iterator[_Call]:
    """Make the calls over span `index`, of which not every token sees all keys: one for the tokens of each step of `KEY_STEP`."""
    for steps in _aligned(own.start, own.stop, KEY_STEP):
        step = steps.start // KEY_STEP * KEY_STEP
        begin = index * span
        if window:
            begin = max(begin, (step - window + 1) // KEY_STEP * KEY_STEP)
        end = min((index + 1) * span, step + KEY_STEP, held_end)
        rows, node = slice(steps.start - own.start, steps.stop - own.start), index - first
        yield _Call(rows, slice(node, node + 1), slice(begin - base, end - base), steps.start - begin)
