"""Partial attention: `(o, lse)` over a part of the keys, and the merge of such parts.

`o` is the output of the attention, `lse` is the natural logarithm of the sum of exponentials of the scaled scores, as in
FlashAttention (https://arxiv.org/abs/2205.14135). Any split of the keys merges to the same result up to rounding. `reference.py`
has simple versions of these functions, for tests.

The result for a token is the same, bit for bit, however many tokens are computed with it. Otherwise a prompt split into other
chunks, or computed again after a peer was lost, could continue with other tokens. Torch's kernel leaves matrix products to MKL,
which chooses an algorithm by the shape of the product; the choice differs between processors. So each token reads exactly the keys
that it would read alone, and a block only has a number of rows for which a trial run gave the same bits as a full block
(`_exact_rows`).
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
"""A range of keys that is read begins at a multiple of this, and ends at a multiple or at the last key."""
MAX_BLOCK_ROWS = 32
"""Maximum number of rows in one query block of torch's kernel."""
_TRIAL_KEYS = 1024
"""Two key blocks of torch's kernel, so that a trial covers the addition of one block to another."""
PARALLEL_WORK = 4 << 20
"""Query elements times keys, below which a second thread costs more (0.1 to 0.2 ms for the hand-over) than it saves."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def to_tensor(array: F32) -> torch.Tensor:
    """View an array as a tensor. A read-only array is copied, since torch has no read-only tensors."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def attend_part(q: F32, k: F32, v: F32, first: int | None = None, rule: AttentionRule = PLAIN) -> Part:
    """Compute attention of `q` `[tokens, heads, head_dim]` over `k` and `v` `[keys, kv_heads, head_dim]`, without the rule's sinks.

    Token i is at key index `first + i` and attends to the keys from the start of the rule's window up to its own index. `first` may
    be negative or beyond the last key. If `first` is None, every token attends to all keys. Keys that no token attends to must be
    finite.

    Returns: o and lse; 0 and -inf for a token that attends to no key.
    """
    runs = [_attend_run_or_nothing(*run, rule) for run in _runs(q, k, v, first, rule.window)]
    return _joined([o for o, _ in runs]), _joined([lse for _, lse in runs])


def attend(q: F32, k: F32, v: F32, first: int, rule: AttentionRule = PLAIN) -> F32:
    """Compute attention of each token to the keys up to its own, with the rule's sinks. Arguments as in `attend_part`.

    Returns: o `[tokens, heads, head_dim]`.
    """
    runs = [_attend_run(*run, rule) for run in _runs(q, k, v, first, rule.window)]
    o = _joined([o for o, _ in runs])
    return o if rule.sinks is None else with_sinks((o, _joined([lse for _, lse in runs])), rule.sinks)


def with_sinks(part: Part, sinks: F32) -> F32:
    """Apply each head's sink, `[heads]`, to a complete attention: multiply o by 1 minus the sink's share of the softmax.

    Uses numpy's exponential: the last bits of torch's depend on the position of the number in its array.
    """
    o, lse = part
    scaled: F32 = o / (1 + np.exp(sinks - lse))[..., None]
    return scaled


def _runs(q: F32, k: F32, v: F32, first: int | None, window: int) -> list[tuple[F32, F32, F32, int | None]]:
    """Split a chunk of tokens at every multiple of `KEY_STEP`, so that each token reads exactly the keys that it would read alone.

    Returns: (q, k, v, first) of each run.
    """
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


def _attend_run_or_nothing(q: F32, k: F32, v: F32, first: int | None, rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention as `_attend_run` does; o is 0 and lse -inf for tokens that attend to no key."""
    tokens, heads, head_dim = q.shape
    sees_nothing = torch.full((tokens,), not len(k))
    if first is not None:
        at = first + torch.arange(tokens)
        sees_nothing |= (at < 0) | ((at - rule.window >= len(k) - 1) & bool(rule.window))
    if sees_nothing.all():
        return torch.zeros(tokens, heads, head_dim), torch.full((tokens, heads), -torch.inf)
    o, lse = _attend_run(q, k, v, first, rule)
    return o.masked_fill(sees_nothing[:, None, None], 0), lse.masked_fill(sees_nothing[:, None], -torch.inf)


def _attend_run(q: F32, k: F32, v: F32, first: int | None, rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of tokens that read the same keys, in one call of the kernel.

    The query group is folded into the rows, so that K and V are read once for all heads that share them. The tokens are arranged in
    blocks of equal size; the last block is padded with copies of the last token.

    Returns: o `[tokens, heads, head_dim]`, lse `[tokens, heads]`.
    """
    tokens, heads, head_dim = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    blocks, size = _layout(tokens, group, head_dim, bool(rule.soft_cap))
    rows = size * group
    queries = to_tensor(q)
    if padding := blocks * size - tokens:
        queries = torch.cat([queries, queries[-1:].expand(padding, heads, head_dim)])
    queries = queries.view(blocks, size, kv_heads, group, head_dim).transpose(1, 2).reshape(blocks, kv_heads, rows, head_dim)
    keys, values = (to_tensor(part).transpose(0, 1).expand(blocks, kv_heads, length, head_dim) for part in (k, v))
    mask = _mask(first, tokens, group, blocks, size, length, rule.window).expand(blocks, 1, rows, length)
    o, lse = _kernel(queries, keys, values, mask, rule.scale, rule.soft_cap)
    o = o.view(blocks, kv_heads, size, group, head_dim).transpose(1, 2).reshape(blocks * size, heads, head_dim)
    lse = lse.view(blocks, kv_heads, size, group).transpose(1, 2).reshape(blocks * size, heads)
    return o[:tokens], lse[:tokens]


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None, soft_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o and lse of blocks.

    `q` is `[blocks, kv_heads, rows, head_dim]`, `k` and `v` are `[blocks, kv_heads, keys, head_dim]`, `mask` is
    `[blocks, 1, rows, keys]`. Torch's own kernel has no soft cap, so attention with a soft cap is computed by single operators.
    """
    if not soft_cap:
        o, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
        return o, lse
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    scale = scale or q.shape[-1] ** -0.5
    for block, head in product(range(q.shape[0]), range(q.shape[1])):  # a batched product's last bits depend on the batch size
        scores = (q[block, head] @ k[block, head].T) * (scale / soft_cap)
        scores = scores.tanh_().mul_(soft_cap).add_(mask[block, 0])
        lse[block, head] = scores.logsumexp(-1)
        o[block, head] = scores.softmax(-1) @ v[block, head]
    return o, lse


def _layout(tokens: int, group: int, head_dim: int, capped: bool) -> tuple[int, int]:
    """Choose how many blocks a call has and how many tokens each block has.

    A block has at most as many rows as the kernel takes at once, and enough that its tokens get the same bits as in a full block.

    Returns: (blocks, tokens in each).
    """
    most = max(1, MAX_BLOCK_ROWS // group)
    blocks = -(-tokens // most)
    least = -(-tokens // blocks)
    exact = _exact_rows(head_dim, capped)
    return blocks, next((size for size in range(least, most) if exact[size * group] >= least * group), most)


@lru_cache(maxsize=8)
def _mask(first: int | None, tokens: int, group: int, blocks: int, size: int, length: int, window: int) -> torch.Tensor:
    """Make the mask that is added to the scores. Cached, since all layers of a step use the same one.

    Returns: 0 or -inf, `[blocks, 1, rows, length]`, or a single row `[1, length]` if it is the same for all rows.
    """
    if first is None:
        return torch.zeros(1, length)
    last_seen = first + torch.arange(1 if tokens == 1 else blocks * size).clamp(max=tokens - 1)[:, None]
    keys = torch.arange(length)
    seen = keys <= last_seen
    if window:
        seen &= keys > last_seen - window
    mask = torch.where(seen, 0.0, -torch.inf)
    return mask if tokens == 1 else mask.repeat_interleave(group, 0).view(blocks, 1, size * group, length)


@lru_cache
def _exact_rows(head_dim: int, capped: bool) -> tuple[int, ...]:
    """Find by trial how many leading rows of a smaller block have the same bits as in a full block. Takes 0.1 s.

    Returns: the number of such rows for blocks of 0 to `MAX_BLOCK_ROWS` rows.
    """
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, size, head_dim, generator=random) for size in (MAX_BLOCK_ROWS, _TRIAL_KEYS, _TRIAL_KEYS))

    def trial(rows: int) -> torch.Tensor:
        mask = torch.zeros(1, 1, rows, _TRIAL_KEYS)
        lengths = range(KEY_STEP, _TRIAL_KEYS + 1, KEY_STEP)
        calls = (_kernel(q[:, :, :rows], k[:, :, :n], v[:, :, :n], mask[..., :n], None, 30.0 * capped)[0][0, 0] for n in lengths)
        return torch.stack(list(calls), 1)  # [rows, lengths, head_dim]

    full = trial(MAX_BLOCK_ROWS)
    return 0, *(
        int((trial(rows) == full[:rows]).flatten(1).all(1).long().cumprod(0).sum()) for rows in range(1, MAX_BLOCK_ROWS + 1)
    )


def merge_parts(parts: Sequence[Part]) -> Part:
    """Merge parts over disjoint keys into one part.

    Parts without keys have no effect. If no part has keys, o is 0 and lse -inf.
    """
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
    """The `Attend` function of a stage whose own peer holds all of its KV."""

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
        """Compute attention of one segment, by KV heads on several threads if the work is large, with the same result."""
        if self._workers.threads == 1 or q.size * len(k) < PARALLEL_WORK:
            return attend(q, k, v, start, rule)
        group = q.shape[1] // k.shape[1]

        def head(index: int) -> F32:
            kv_head, heads = slice(index, index + 1), slice(index * group, (index + 1) * group)
            own = rule if rule.sinks is None else replace(rule, sinks=rule.sinks[heads])
            return attend(q[:, heads], k[:, kv_head], v[:, kv_head], start, own)

        return np.concatenate(self._workers.map(head, range(k.shape[1])), axis=1)
