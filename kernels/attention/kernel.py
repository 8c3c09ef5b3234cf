"""Attention of queries over ranges of keys, by torch's kernel, with bits that do not depend on the number of queries.

Torch's kernel leaves matrix products to MKL, which chooses an algorithm by the shape of the product; the choice differs between
processors. So a block of queries only has a number of rows for which a trial gave the same bits as a full block (`_exact_rows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from meshd.kernels.attention.tree import F32, SPAN_TOKENS, Part
from meshd.kernels.backend import AttentionRule

KEY_STEP = 32
"""A range of keys that is read begins at a multiple of this, and ends at a multiple or at the last key."""
MAX_BLOCK_ROWS = 32
"""Maximum number of rows in one query block of torch's kernel."""

_flash = torch._C._VariableFunctions._scaled_dot_product_flash_attention_for_cpu
"""Called without `torch.ops`, whose Python part takes 3 of 16 microseconds."""


def to_tensor(array: F32) -> torch.Tensor:
    """View an array as a tensor. A read-only array is copied, since torch has no read-only tensors."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Held(NamedTuple):
    """The keys that one call of a single token reads."""

    k: F32
    """`[ranges, keys, kv_heads, head_dim]`."""
    v: F32
    first: int | None
    """Index of the token among the keys of its one range. None: it attends to all keys."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """How the rows of a call are arranged in blocks. Row `token * group + i` is the i-th query that shares the token's K and V."""

    tokens: int
    """Tokens in each block but the last, which has what is left."""
    rows: npt.NDArray[np.int64]
    """`[blocks, rows]`: the row at each place. Places that are left over repeat the block's last row."""


def attend_keys(q: F32, k: F32, v: F32, first: int | None, rule: AttentionRule, out: Part) -> None:
    """Compute attention of `q` `[tokens, heads, head_dim]` over each of several ranges of keys, without the rule's sinks.

    `k` and `v` are `[ranges, keys, kv_heads, head_dim]`. `out` gets o `[ranges, tokens, heads, head_dim]` and lse, which lacks the
    last dimension. If `first` is None, every token attends to all keys. Otherwise there is one range; token i is at its key
    `first + i` and attends to the keys from the start of the rule's window up to its own, at least one. Other keys must be finite.

    Views are made by numpy, in a third of the time that torch takes: that time was as long as the kernel's for one token.
    """
    ranges, length, kv_heads, head_dim = k.shape
    tokens, heads, _ = q.shape
    group = heads // kv_heads
    layout = _layout(tokens, group, head_dim, bool(rule.soft_cap))
    blocks, size = len(layout.rows), layout.tokens
    by_head = q.reshape(tokens, kv_heads, group, head_dim).swapaxes(0, 1).reshape(kv_heads, tokens * group, head_dim)
    queries = by_head.take(layout.rows, 1).swapaxes(0, 1)  # [blocks, kv_heads, rows, head_dim]
    keys, values = to_tensor(k.swapaxes(1, 2)), to_tensor(v.swapaxes(1, 2))  # [ranges, kv_heads, keys, head_dim]
    mask = None if first is None else _mask(first, layout, group, tokens, length, rule.window)
    o_out, lse_out = (part.reshape(ranges, tokens, kv_heads, group, *part.shape[3:]) for part in out)  # views
    if blocks <= ranges:  # as few calls as possible
        for block, begin in enumerate(range(0, tokens, size)):
            own = to_tensor(queries[block : block + 1])
            done = _kernel(own if ranges == 1 else own.expand(ranges, -1, -1, -1), keys, values, mask, rule)
            _take(done, o_out[:, begin : begin + size], lse_out[:, begin : begin + size])
        return
    full = tokens // size
    whole, shape = full * size, (blocks, kv_heads, length, head_dim)
    for index in range(ranges):
        o, lse = _kernel(to_tensor(queries), keys[index].expand(shape), values[index].expand(shape), mask, rule)
        if full:
            by_block = (part[index, :whole].reshape(full, size, *part.shape[2:]) for part in (o_out, lse_out))
            _take((o[:full], lse[:full]), *by_block)
        if whole < tokens:
            _take((o[full:], lse[full:]), o_out[index, None, whole:], lse_out[index, None, whole:])


def attend_each(q: F32, held: Sequence[Sequence[Held]], rule: AttentionRule) -> Part:
    """Compute attention of single tokens of several sessions, each over ranges of its own keys, as `attend_keys` does.

    `q` is `[tokens, heads, head_dim]`; `held` has one or more entries for each token, together `n` ranges for every token.
    What is not the kernel is done once for all tokens: for each of them alone it took longer than the kernel.

    Returns: o `[n, tokens, heads, head_dim]`, lse `[n, tokens, heads]`.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = held[0][0].k.shape[2]
    group = heads // kv_heads
    layout = _layout(1, group, head_dim, bool(rule.soft_cap))
    by_head = q.reshape(tokens, kv_heads, group, head_dim)
    if layout.rows.shape[1] != group:
        by_head = by_head.take(layout.rows[0], 2)
    queries = to_tensor(by_head)
    parts = []
    for own, calls in zip(queries.unsqueeze(1).unbind() if tokens > 1 else (queries,), held, strict=True):
        for k, v, first in calls:
            keys, values = to_tensor(k.swapaxes(1, 2)), to_tensor(v.swapaxes(1, 2))  # [ranges, kv_heads, keys, head_dim]
            mask = None if first is None else _mask(first, layout, group, 1, k.shape[1], rule.window)
            parts.append(_kernel(own if len(k) == 1 else own.expand(len(k), -1, -1, -1), keys, values, mask, rule))
    joined = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    o, lse = (part.numpy()[:, :, :group] for part in joined)  # [tokens * n, kv_heads, group, ...]
    return o.reshape(tokens, -1, heads, head_dim).swapaxes(0, 1), lse.reshape(tokens, -1, heads).swapaxes(0, 1)


def _take(done: tuple[torch.Tensor, torch.Tensor], o: F32, lse: F32) -> None:
    """Copy a result of `_kernel` to `o` `[n, tokens, kv_heads, group, head_dim]` and `lse` `[n, tokens, kv_heads, group]`."""
    n, tokens, kv_heads, group = lse.shape
    for tensor, target in zip(done, (o, lse), strict=True):
        rows = tensor.numpy()[:, :, : tokens * group]
        target[...] = rows.reshape(n, kv_heads, tokens, group, *rows.shape[3:]).swapaxes(1, 2)


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute o and lse of blocks.

    `q` is `[blocks, kv_heads, rows, head_dim]`, `k` and `v` are `[blocks, kv_heads, keys, head_dim]`; `mask`, `[blocks, 1, rows,
    keys]`, is added to the scores. Torch's kernel has no soft cap, so attention with a soft cap is computed by single operators.
    """
    if not rule.soft_cap:
        o, lse = _flash(q, k, v, attn_mask=mask, scale=rule.scale)
        return o, lse
    o, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
    scale = rule.scale or q.shape[-1] ** -0.5
    for block, head in product(range(q.shape[0]), range(q.shape[1])):  # a batched product's last bits depend on the batch size
        scores = (q[block, head] @ k[block, head].T) * (scale / rule.soft_cap)
        scores = scores.tanh_().mul_(rule.soft_cap)
        if mask is not None:
            scores += mask[block, 0]
        shares = scores.softmax(-1)
        # The largest share is 1 / sum; numpy's logarithm: on some processors the bits of torch's depend on the place.
        lse[block, head] = scores.amax(-1) - to_tensor(np.log(shares.amax(-1).numpy()))
        o[block, head] = shares @ v[block, head]
    return o, lse


def block_tokens(group: int) -> int:
    """Return how many tokens a full block has, if `group` queries share each K and V."""
    return max(1, MAX_BLOCK_ROWS // group)


@lru_cache(maxsize=64)
def _layout(tokens: int, group: int, head_dim: int, capped: bool) -> _Layout:
    """Choose how many blocks a call has and how many rows each block has.

    A block has at most as many rows as the kernel takes at once, and enough that its tokens get the same bits as in a full block.
    """
    blocks = -(-tokens // block_tokens(group))
    size = -(-tokens // blocks)
    exact = _exact_rows(head_dim, capped)
    used = size * group
    rows = next((rows for rows in range(used, MAX_BLOCK_ROWS) if exact[rows] >= used), max(used, MAX_BLOCK_ROWS))
    first = np.arange(blocks)[:, None] * used
    return _Layout(size, np.minimum(first + np.minimum(np.arange(rows), used - 1), tokens * group - 1))


@lru_cache(maxsize=64)
def _mask(first: int, layout: _Layout, group: int, tokens: int, length: int, window: int) -> torch.Tensor:
    """Make the mask that is added to the scores. Cached, since all layers of a step use the same ones.

    A chunk of 128 tokens needs up to 18, with two kinds of layers; a mask takes at most 64 KiB for each query of a group.

    Returns: 0 or -inf, `[blocks, 1, rows, length]`.
    """
    last_seen = torch.from_numpy(first + (layout.rows if tokens > 1 else layout.rows[:, :1]) // group)[:, None, :, None]
    keys = torch.arange(length)
    seen = keys <= last_seen
    if window:
        seen &= keys > last_seen - window
    blocks, rows = layout.rows.shape
    return torch.where(seen, 0.0, -torch.inf).expand(blocks, 1, rows, length)


@lru_cache
def _exact_rows(head_dim: int, capped: bool) -> tuple[int, ...]:
    """Find by trial how many leading rows of a smaller block have the same bits as in a full block, for up to a span of keys.

    Returns: the number of such rows for blocks of 0 to `MAX_BLOCK_ROWS` rows.
    """
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, size, head_dim, generator=random) for size in (MAX_BLOCK_ROWS, SPAN_TOKENS, SPAN_TOKENS))
    rule = AttentionRule(soft_cap=30.0 * capped)

    def trial(rows: int) -> torch.Tensor:
        mask = torch.zeros(1, 1, rows, SPAN_TOKENS)
        lengths = range(KEY_STEP, SPAN_TOKENS + 1, KEY_STEP)
        calls = [_kernel(q[:, :, :rows], k[:, :, :n], v[:, :, :n], mask[..., :n], rule) for n in lengths]
        return torch.stack([torch.cat((o, lse[..., None]), -1)[0, 0] for o, lse in calls], 1)  # [rows, lengths, head_dim + 1]

    full = trial(MAX_BLOCK_ROWS)
    return 0, *(
        int((trial(rows) == full[:rows]).flatten(1).all(1).long().cumprod(0).sum()) for rows in range(1, MAX_BLOCK_ROWS + 1)
    )
