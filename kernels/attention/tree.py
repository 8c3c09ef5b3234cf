"""The tree that merges the parts of a token's attention.

A part `(o, lse)` is the attention over some of the keys: `o` is its output, `lse` the natural logarithm of the sum of exponentials
of its scaled scores, as in FlashAttention (https://arxiv.org/abs/2205.14135). Positions are divided into spans of `SPAN_TOKENS`.
Span s holds the positions `[s * SPAN_TOKENS, (s + 1) * SPAN_TOKENS)`, whatever session, chunk or device they are in.

    node(0, s)         = the part over span s
    node(level, index) = merge(node(level - 1, 2 index), node(level - 1, 2 index + 1))

So `node(level, index)` covers an aligned run of `2 ** level` spans, and the result is the node that covers all spans: a binary
counter of spans carries in the same order. A span that a token does not see (left of its window, or behind the token) is absent. A
node with one absent child is the other child, bit for bit; a node with two absent children is absent. In memory, an absent part
has o = 0 and lse = -inf.

Additions of floats are not associative, so a tree with other nodes gives other bits. This one can be cut: who holds an aligned run
of spans computes its node and answers with one part, and `merge_runs` gives the bits that one holder of all spans gets.

Every operation is elementwise, and none depends on an element's place in its array: additions and products are rounded as IEEE 754
says, `logaddexp` calls the C library for each element, and numpy's `exp` and `log` of float32 compute the elements that do not
fill a vector with the same instructions (torch's do not on every processor). A test tries these.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault

F32 = npt.NDArray[np.float32]
Part = tuple[F32, F32]
"""o `[tokens, heads, head_dim]`, lse `[tokens, heads]`."""

SPAN_TOKENS = 512
"""Positions in a span: part of what defines results, so of a numerics id. A multiple of `KEY_STEP` and of a block of KV.

Measured by `bench_attention.py` on two AVX2 cores, as ratios to a single pass over all keys, for spans of 128, 256, 512 and 1,024.
A chunk of 128 tokens at 2,048 keys: 1.31, 1.06, 0.97, 0.97 (9 heads, 3 KV heads of 64), 1.27, 1.10, 0.97, 0.96 (32, 4 of 64); a
token at 2,048 keys: 1.45, 1.35, 1.30, 1.24 and 1.40, 1.27, 1.20, 1.16; with a window of 512 (4 heads, 1 of 256): 2.07, 1.50, 0.94,
0.98. So shorter spans cost, and longer ones gain little and can be shared among fewer peers.
"""


def merge_nodes(o: F32, lse: F32, index: int) -> Part:
    """Merge consecutive nodes of one level, none of which is absent; the first is node `index` of its level.

    `o` is `[nodes, tokens, heads, head_dim]`, `lse` is `[nodes, tokens, heads]`. All pairs of a level are merged in one call.

    Returns: the lowest node that covers them all.
    """
    while len(o) > 1:
        o, lse = _next_level(o, lse, index % 2)
        index //= 2
    return o[0], lse[0]


def _next_level(o: F32, lse: F32, lone: int) -> Part:
    """Merge the pairs of one level. `lone` is 1 if the first node is a right child, whose sibling is absent, otherwise 0."""
    pairs = (len(o) - lone) // 2
    end = lone + 2 * pairs
    if not pairs:
        return o, lse
    count = lone + pairs + len(o) - end
    up_o, up_lse = np.empty((count, *o.shape[1:]), np.float32), np.empty((count, *lse.shape[1:]), np.float32)
    left, right, merged = slice(lone, end, 2), slice(lone + 1, end, 2), slice(lone, lone + pairs)
    _merge(o[left], lse[left], o[right], lse[right], up_o[merged], up_lse[merged])
    if lone:
        up_o[0], up_lse[0] = o[0], lse[0]
    if end < len(o):
        up_o[-1], up_lse[-1] = o[-1], lse[-1]
    return up_o, up_lse


def _merge(left_o: F32, left_lse: F32, right_o: F32, right_lse: F32, o: F32, lse: F32) -> None:
    """Merge parts into `o` and `lse`: lse is log(exp(left) + exp(right)), o is left + (right - left) * exp(right's lse - lse)."""
    np.logaddexp(left_lse, right_lse, out=lse)
    share = right_lse - lse
    np.exp(share, out=share)
    np.subtract(right_o, left_o, out=o)
    o *= share[..., None]
    o += left_o


def merge_runs(runs: Sequence[tuple[range, Part]]) -> Part:
    """Merge the nodes of disjoint, aligned runs of spans, in any order. A run is a range of spans, even if only some of them exist.

    Returns: the same bits for any runs that cover the same spans.
    Raises: LocalFault for a run that is not aligned, for runs that overlap, and without a run.
    """
    stack: list[tuple[int, Part]] = []
    """Nodes from left to right, each by one span of it; the node over two neighbours has a lower level than the one before it."""
    end = 0
    for run, part in sorted(runs, key=lambda held: held[0].start):
        size = len(run)
        if run.step != 1 or size & -size != size or not size or run.start % size or run.start < end:
            raise LocalFault(f"spans {run.start} to {run.stop - 1} are no aligned run behind span {end}")
        end = run.stop
        while len(stack) > 1 and _meeting_level(stack[-2][0], stack[-1][0]) < _meeting_level(stack[-1][0], run.start):
            _merge_top(stack)
        stack.append((run.start, part))
    if not stack:
        raise LocalFault("no parts of an attention to merge")
    while len(stack) > 1:
        _merge_top(stack)
    return stack[0][1]


def _meeting_level(span: int, other: int) -> int:
    """Return the level of the lowest node that covers two spans."""
    return (span ^ other).bit_length()


def _merge_top(stack: list[tuple[int, Part]]) -> None:
    _, right = stack.pop()
    span, left = stack.pop()
    stack.append((span, merge_pair(left, right)))


def merge_pair(left: Part, right: Part) -> Part:
    """Merge a node's two children, where each token of each head may be absent in either.

    Returns: new arrays.
    """
    o, lse = np.empty_like(left[0]), np.empty_like(left[1])
    with np.errstate(invalid="ignore"):  # what two absent parts give is NaN until it is replaced
        _merge(*left, *right, o, lse)
    for (present_o, present_lse), (_, other_lse) in ((left, right), (right, left)):
        alone = np.isneginf(other_lse)
        if alone.any():
            o[alone], lse[alone] = present_o[alone], present_lse[alone]
    return o, lse


def with_sinks(part: Part, sinks: F32) -> F32:
    """Apply each head's sink, `[heads]`, to a complete attention: multiply o by 1 minus the sink's share of the softmax."""
    o, lse = part
    scaled: F32 = o / (1 + np.exp(sinks - lse))[..., None]
    return scaled
