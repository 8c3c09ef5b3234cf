"""Partial attention: `(o, lse)` over a part of the keys, and the merge of such parts.

`lse` is the natural logarithm of the sum of exponentials of the scaled scores, as in FlashAttention
(https://arxiv.org/abs/2205.14135). Any split of the keys merges to the same result up to rounding. The plain forms stand in
`reference.py`.

A token's bits do not depend on how many tokens are computed with it, so that a prompt read in any chunks, or read again after a
loss, goes on with the same tokens. MKL picks its way of summing by the shape of a product; in the shapes that are left here (as
many keys for a token as it would have alone, `_fewest_rows` to 32 rows) it was found to sum alike, over 120 pairs of head size and
group.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from meshd.kernels.backend import Projected, Segment
from meshd.kernels.kv import KVPool
from meshd.kernels.torch_ops import to_tensor
from meshd.kernels.workers import Workers

F32 = npt.NDArray[np.float32]
Part = tuple[F32, F32]
"""o `[tokens, heads, head_dim]`, lse `[tokens, heads]`."""

KEY_STEP = 32
MOST_ROWS = 32
"""What torch's kernel takes as one block of queries."""
PARALLEL_WORK = 4 << 20
"""Query elements times keys: below this, a hand-over to a second thread (0.1 to 0.2 ms) costs more than it saves."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend_part(q: F32, k: F32, v: F32, first: int | None = None) -> Part:
    """Attention of `q` `[tokens, heads, head_dim]` over `k` and `v` `[keys, kv_heads, head_dim]`.

    Token i sees keys 0 to first + i; with `first` None it sees all. Keys that nobody sees may follow; they must be finite. With no
    keys, o is 0 and lse -inf.
    """
    if not len(k):
        return np.zeros_like(q), np.full(q.shape[:2], -np.inf, np.float32)
    calls = [_flash_few(*few) for few in _split(q, k, v, first)]
    return _by_token([o for o, _ in calls], q.shape), _by_token([lse for _, lse in calls], q.shape[:2])


def attend(q: F32, k: F32, v: F32, first: int) -> F32:
    """`attend_part` over all keys up to each token, without its lse."""
    return _by_token([_flash_few(*few)[0] for few in _split(q, k, v, first)], q.shape)


def _split(q: F32, k: F32, v: F32, first: int | None) -> list[tuple[F32, F32, F32, int | None]]:
    """The arguments of each call."""
    tokens = len(q)
    if tokens == 1:
        return [(q, k, v, first)]
    cuts = _cuts(tokens, max(1, MOST_ROWS // (q.shape[1] // k.shape[1])), first or 0)
    return [(q[a:b], k, v, None if first is None else first + a) for a, b in pairwise(cuts)]


def _cuts(tokens: int, at_once: int, first: int) -> list[int]:
    """Where to cut a chunk: at every step of keys, so that a token reads as many as it would alone, and by what a call takes."""
    steps = [0, *range(KEY_STEP - first % KEY_STEP, tokens, KEY_STEP), tokens]
    return [i for a, b in pairwise(steps) for i in range(a, b, at_once)] + [tokens]


def _flash_few(q: F32, k: F32, v: F32, first: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As many tokens as one call takes: o `[tokens, kv_heads, group, head_dim]`, lse `[tokens, kv_heads, group]`.

    The query group is folded into the rows, so that K and V are read once for all heads that share them.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = tokens * group
    length = len(k) if first is None else min(-(-(first + tokens) // KEY_STEP) * KEY_STEP, len(k))
    keys, values = to_tensor(k[:length]).transpose(0, 1).unsqueeze(0), to_tensor(v[:length]).transpose(0, 1).unsqueeze(0)
    queries = to_tensor(q).view(tokens, kv_heads, group, head_dim).transpose(0, 1).reshape(1, kv_heads, rows, head_dim)
    mask = torch.zeros(1, length) if first is None else _mask(first, tokens, group, length)
    copies = -(-_fewest_rows(head_dim) // rows)
    if copies > 1:
        queries = queries.repeat(1, 1, copies, 1)
        mask = mask.repeat(copies, 1) if len(mask) > 1 else mask
    o, lse = _flash(queries, keys, values, attn_mask=mask.expand(1, 1, rows * copies, length))
    if copies > 1:
        o, lse = o[:, :, :rows], lse[:, :, :rows]
    return o.view(kv_heads, tokens, group, head_dim).transpose(0, 1), lse.view(kv_heads, tokens, group).transpose(0, 1)


def _by_token(calls: Sequence[torch.Tensor], shape: tuple[int, ...]) -> F32:
    """The calls' tokens under one another."""
    whole = calls[0] if len(calls) == 1 else torch.cat(list(calls))
    return whole.reshape(shape).numpy()


def _mask(first: int, tokens: int, group: int, length: int) -> torch.Tensor:
    """What is added to the scores: `[tokens * group, length]`, or one row for all if there is one token."""
    if tokens == 1:
        return _row(first, length)
    last_seen = torch.arange(first, first + tokens)[:, None]
    return torch.where(torch.arange(length) <= last_seen, 0.0, -torch.inf).repeat_interleave(group, 0)


@lru_cache(maxsize=16)
def _row(last_seen: int, length: int) -> torch.Tensor:
    """Kept, since every layer of a decode step asks for the same."""
    return torch.where(torch.arange(length) <= last_seen, 0.0, -torch.inf)[None]


def _fewest_rows(head_dim: int) -> int:
    """With fewer, MKL takes another way than for a full block."""
    return 3 if head_dim <= 64 else head_dim // 16


def merge(parts: Sequence[Part]) -> Part:
    """One part of several over disjoint keys. Empty parts count nothing; if all are, so is the result."""
    if len(parts) == 1:
        return parts[0]
    lses = np.stack([lse for _, lse in parts])  # [parts, tokens, heads]
    top = lses.max(axis=0)
    weights = np.exp(lses - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=0)
    shares = weights / np.where(total > 0, total, 1)
    o = np.einsum("pth,pthd->thd", shares, np.stack([o for o, _ in parts]))
    with np.errstate(divide="ignore"):
        return o, np.log(total) + np.where(np.isfinite(top), top, 0)


class LocalAttention:
    """The `Attend` of a stage that holds all of its KV itself."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def __call__(self, layer: int, projected: Projected, segments: Sequence[Segment], kv: KVPool) -> F32:
        """Store the segments' new K and V, then attend over each segment's keys up to each token."""
        out = np.empty_like(projected.q)
        begin = 0
        for segment in segments:
            rows = slice(begin, begin + segment.tokens)
            begin += segment.tokens
            kv.write(layer, segment.table, segment.start, projected.k[rows], projected.v[rows])
            k, v = kv.read(layer, segment.table, segment.start + segment.tokens)
            out[rows] = self._attend(projected.q[rows], k, v, segment.start)
        return out

    def _attend(self, q: F32, k: F32, v: F32, start: int) -> F32:
        """By several threads, each with some of the KV heads, if there is enough to do; this leaves the bits as they are."""
        if self._workers.threads == 1 or q.size * len(k) < PARALLEL_WORK:
            return attend(q, k, v, start)
        group = q.shape[1] // k.shape[1]

        def head(index: int) -> F32:
            kv_head = slice(index, index + 1)
            return attend(q[:, index * group : (index + 1) * group], k[:, kv_head], v[:, kv_head], start)

        return np.concatenate(self._workers.map(head, range(k.shape[1])), axis=1)
