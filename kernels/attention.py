"""Partial attention: `(o, lse)` over a part of the keys, and the merge of such parts.

`lse` is the natural logarithm of the sum of exponentials of the scaled scores, as in FlashAttention
(https://arxiv.org/abs/2205.14135). Any split of the keys merges to the same result up to rounding. The plain forms stand in
`reference.py`.

A token's bits do not depend on how many tokens are computed with it, so that a prompt read in any chunks, or read again after a
loss, goes on with the same tokens. Torch's kernel leaves the sums to MKL, which picks its way by the shape of a product, otherwise
on every processor. So a token sees as many keys as it would alone, and is computed in blocks whose rows are found, by trying, to
have the bits of a full one (`_exact_rows`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import torch

from meshd.kernels.backend import PLAIN, AttentionRule, Projected, Segment
from meshd.kernels.kv import KVPool
from meshd.kernels.threads import Workers

F32 = npt.NDArray[np.float32]
Part = tuple[F32, F32]
"""o `[tokens, heads, head_dim]`, lse `[tokens, heads]`."""

KEY_STEP = 32
MOST_ROWS = 32
"""What torch's kernel takes as one block of queries."""
_KEYS_TRIED = 1024
"""Two of its blocks of keys: the second one is added to the first."""
PARALLEL_WORK = 4 << 20
"""Query elements times keys: below this, a hand-over to a second thread (0.1 to 0.2 ms) costs more than it saves."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def to_tensor(array: F32) -> torch.Tensor:
    """View an array as a tensor; a read-only array, which torch can't hold, is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def attend_part(q: F32, k: F32, v: F32, first: int | None = None, rule: AttentionRule = PLAIN) -> Part:
    """Attention of `q` `[tokens, heads, head_dim]` over `k` and `v` `[keys, kv_heads, head_dim]`, without the rule's sinks.

    Token i stands at key `first + i` and sees up to that one, as far back as the rule's window reaches; `first` may lie before the
    part or behind it. With `first` None it sees all. Keys that nobody sees may follow; they must be finite. With no keys to see, o
    is 0 and lse -inf.
    """
    runs = [_seen(*run, rule) for run in _runs(q, k, v, first, rule.window)]
    return _joined([o for o, _ in runs]), _joined([lse for _, lse in runs])


def attend(q: F32, k: F32, v: F32, first: int, rule: AttentionRule = PLAIN) -> F32:
    """`attend_part` over all keys up to each token, sinks included, without its lse."""
    runs = [_run(*run, rule) for run in _runs(q, k, v, first, rule.window)]
    o = _joined([o for o, _ in runs])
    return o if rule.sinks is None else with_sinks((o, _joined([lse for _, lse in runs])), rule.sinks)


def with_sinks(part: Part, sinks: F32) -> F32:
    """What is left of a whole attention's o when each head's sink `[heads]` has had its share.

    numpy's exponential, unlike torch's, gives a number the same bits wherever it lies in its array.
    """
    o, lse = part
    left: F32 = o / (1 + np.exp(sinks - lse))[..., None]
    return left


def _runs(q: F32, k: F32, v: F32, first: int | None, window: int) -> list[tuple[F32, F32, F32, int | None]]:
    """The arguments of each call: a chunk is cut at every step of keys, so that a token reads the very keys it would alone."""
    if first is None:
        return [(q, k, v, None)]
    runs: list[tuple[F32, F32, F32, int | None]] = []
    for a, b in pairwise([0, *range(KEY_STEP - first % KEY_STEP, len(q), KEY_STEP), len(q)]):
        step = (first + a) // KEY_STEP * KEY_STEP
        begin = max(0, (step - window + 1) // KEY_STEP * KEY_STEP) if window else 0
        end = max(begin, min(step + KEY_STEP, len(k)))
        runs.append((q[a:b], k[begin:end], v[begin:end], first + a - begin))
    return runs


def _joined(runs: Sequence[torch.Tensor]) -> F32:
    return (runs[0] if len(runs) == 1 else torch.cat(list(runs))).numpy()


def _seen(q: F32, k: F32, v: F32, first: int | None, rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor]:
    """`_run`, also for tokens that see none of the keys."""
    tokens, heads, head_dim = q.shape
    blind = torch.full((tokens,), not len(k))
    if first is not None:
        at = first + torch.arange(tokens)
        blind |= (at < 0) | ((at - rule.window >= len(k) - 1) & bool(rule.window))
    if blind.all():
        return torch.zeros(tokens, heads, head_dim), torch.full((tokens, heads), -torch.inf)
    o, lse = _run(q, k, v, first, rule)
    return o.masked_fill(blind[:, None, None], 0), lse.masked_fill(blind[:, None], -torch.inf)


def _run(q: F32, k: F32, v: F32, first: int | None, rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that read the same keys, in one call: o `[tokens, heads, head_dim]`, lse `[tokens, heads]`.

    The query group is folded into the rows, so that K and V are read once for all heads that share them. The tokens are laid out
    as blocks of equal size, the last one filled up with copies.
    """
    tokens, heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    blocks, at_once = _layout(tokens, group, head_dim, bool(rule.soft_cap))
    rows = at_once * group
    queries = to_tensor(q)
    if spare := blocks * at_once - tokens:
        queries = torch.cat([queries, queries[-1:].expand(spare, heads, head_dim)])
    queries = queries.view(blocks, at_once, kv_heads, group, head_dim).transpose(1, 2).reshape(blocks, kv_heads, rows, head_dim)
    keys, values = (to_tensor(part).transpose(0, 1).expand(blocks, kv_heads, length, head_dim) for part in (k, v))
    mask = _mask(first, tokens, group, blocks, at_once, length, rule.window).expand(blocks, 1, rows, length)
    o, lse = _kernel(queries, keys, values, mask, rule.scale, rule.soft_cap)
    o = o.view(blocks, kv_heads, at_once, group, head_dim).transpose(1, 2).reshape(blocks * at_once, heads, head_dim)
    lse = lse.view(blocks, kv_heads, at_once, group).transpose(1, 2).reshape(blocks * at_once, heads)
    return o[:tokens], lse[:tokens]


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, soft_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[blocks, kv_heads, rows, head_dim]` each, `mask` `[blocks, 1, rows, keys]`. Torch's own kernel knows no caps."""
    if not soft_cap:
        o, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
        return o, lse
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    scale = scale or q.shape[-1] ** -0.5
    for block, head in product(range(q.shape[0]), range(q.shape[1])):  # one product each: the same bits for any number
        scores = (q[block, head] @ k[block, head].T) * (scale / soft_cap)
        scores = scores.tanh_().mul_(soft_cap).add_(mask[block, 0])
        lse[block, head] = scores.logsumexp(-1)
        o[block, head] = scores.softmax(-1) @ v[block, head]
    return o, lse


def _layout(tokens: int, group: int, head_dim: int, capped: bool) -> tuple[int, int]:
    """Blocks of a call, and tokens in each: no more rows than the kernel takes at once, and enough for a full block's bits."""
    most = max(1, MOST_ROWS // group)
    blocks = -(-tokens // most)
    least = -(-tokens // blocks)
    exact = _exact_rows(head_dim, capped)
    return blocks, next((size for size in range(least, most) if exact[size * group] >= least * group), most)


@lru_cache(maxsize=8)
def _mask(first: int | None, tokens: int, group: int, blocks: int, at_once: int, length: int, window: int) -> torch.Tensor:
    """What is added to the scores: `[blocks, 1, rows, length]`, or one row for all. Kept, since every layer asks for the same."""
    if first is None:
        return torch.zeros(1, length)
    last_seen = first + torch.arange(1 if tokens == 1 else blocks * at_once).clamp(max=tokens - 1)[:, None]
    keys = torch.arange(length)
    seen = keys <= last_seen
    if window:
        seen &= keys > last_seen - window
    mask = torch.where(seen, 0.0, -torch.inf)
    return mask if tokens == 1 else mask.repeat_interleave(group, 0).view(blocks, 1, at_once * group, length)


@lru_cache
def _exact_rows(head_dim: int, capped: bool) -> tuple[int, ...]:
    """How many rows, from the first on, have the bits of a full block, in blocks of 0 to `MOST_ROWS`. Takes 0.1 s."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, size, head_dim, generator=random) for size in (MOST_ROWS, _KEYS_TRIED, _KEYS_TRIED))

    def tried(rows: int) -> torch.Tensor:
        mask = torch.zeros(1, 1, rows, _KEYS_TRIED)
        lengths = range(KEY_STEP, _KEYS_TRIED + 1, KEY_STEP)
        calls = (_kernel(q[:, :, :rows], k[:, :, :n], v[:, :, :n], mask[..., :n], None, 30.0 * capped)[0][0, 0] for n in lengths)
        return torch.stack(list(calls), 1)  # [rows, lengths, head_dim]

    full = tried(MOST_ROWS)
    return 0, *(int((tried(rows) == full[:rows]).flatten(1).all(1).long().cumprod(0).sum()) for rows in range(1, MOST_ROWS + 1))


def merge_parts(parts: Sequence[Part]) -> Part:
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
            out[rows] = self._attend(projected.q[rows], k, v, segment.start, projected.rule)
        return out

    def _attend(self, q: F32, k: F32, v: F32, start: int, rule: AttentionRule) -> F32:
        """By several threads, each with some of the KV heads, if there is enough to do; this leaves the bits as they are."""
        if self._workers.threads == 1 or q.size * len(k) < PARALLEL_WORK:
            return attend(q, k, v, start, rule)
        group = q.shape[1] // k.shape[1]

        def head(index: int) -> F32:
            kv_head, heads = slice(index, index + 1), slice(index * group, (index + 1) * group)
            own = rule if rule.sinks is None else replace(rule, sinks=rule.sinks[heads])
            return attend(q[:, heads], k[:, kv_head], v[:, kv_head], start, own)

        return np.concatenate(self._workers.map(head, range(k.shape[1])), axis=1)
