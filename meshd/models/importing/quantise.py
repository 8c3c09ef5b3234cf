"""Quantise weights to GGUF's block kinds, for `--quant` at import.

8 bits: Q8_0, with the same bits as ggml's. 4 bits: Q4_1, with a search for the best scale and minimum. Q4_1 has the same formula
as Q4_K, but scales of 16 instead of 6 bits, and its rows need only be multiples of 32 weights. The table has the RMS error in % of
the weights' RMS, for random weights with a normal and with a heavy-tailed distribution (Student's t, 5 degrees of freedom).
"Searched" means: with a search for the best scale, and minimum if the kind has one.

| | Q4_0 | Q4_0, searched | Q4_1 | Q4_K, searched | Q4_1, searched | Q8_0 |
|---|---|---|---|---|---|---|
| normal | 8.60 | 8.11 | 7.82 | 7.29 | 7.18 | 0.54 |
| heavy tails | 10.78 | 10.31 | 8.99 | 8.42 | 8.25 | 0.68 |
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

BLOCK = 32
"""Number of weights in a block, both of Q8_0 and of Q4_1."""
SPARE = (2.0, 1.0, 0.0, -1.0)
"""The search tries the scale (largest - smallest weight) / (15 + n) for each n. With n = 0, weights that are on an even grid of 16
levels are restored exactly."""
REFITS = 2
"""Number of times that a scale and a minimum are fitted again, to the codes of the best pair so far."""
_HALVES = {"Q8_0": 2, "Q4_1": 4}
"""Kind -> number of bytes at the start of a block that hold float16 values: the scale, and Q4_1's minimum."""


def quantise(values: F32, kind: str) -> U8:
    """Quantise a flat array of a multiple of 32 weights. Returns: the bytes of the blocks, flat.

    Raises: ValueError if the scale or the minimum of a block overflows float16.
    """
    blocks = _KINDS[kind](values.reshape(-1, BLOCK))
    halves = np.ascontiguousarray(blocks[:, : _HALVES[kind]]).view(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"a block of its weights is too large for {kind}")
    return blocks.reshape(-1)


def _q8_0(weights: F32) -> U8:
    """Quantise `[n, 32]` weights to `[n, 34]` bytes. A scale that overflows float16 is infinite. Ties round away from zero."""
    scale = abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    codes = weights * _inverse(scale)
    whole = np.trunc(codes)
    whole += np.trunc(2 * (codes - whole))
    return np.concatenate([_half_bytes(scale), whole.astype(np.int8).view(np.uint8)], axis=1)


def _q4_1(weights: F32) -> U8:
    """Quantise `[n, 32]` weights to `[n, 20]` bytes. A scale or minimum that overflows float16 is infinite."""
    x = np.ascontiguousarray(weights.T)  # [32, n]: sums over a block read contiguous rows
    lowest = x.min(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        scale, minimum = _fit(x - lowest, 15)
        scales, minima = _half_bytes(scale[:, None]), _half_bytes((minimum + lowest)[:, None])
        scale, minimum = (half.view(np.float16)[:, 0].astype(np.float32) for half in (scales, minima))
        codes = _codes(x, scale, minimum, 15, np.empty_like(x)).astype(np.uint8).T
    return np.concatenate([scales, minima, codes[:, :16] | codes[:, 16:] << np.uint8(4)], axis=1)


def _fit(x: F32, levels: int) -> tuple[F32, F32]:
    """Fit a scale and a minimum to each column of `x` `[32, n]`. The smallest value of a column must be 0.

    Returns: (scale, minimum) `[n]`, those with the smallest sum of squared errors among all that were tried.
    """
    middle = x.max(axis=0) / 2
    total = x.sum(axis=0)
    best, scale, minimum = np.zeros_like(total), 2 * middle / levels, np.zeros_like(total)
    codes = np.empty_like(x)
    for attempt in (*SPARE, *[None] * REFITS):
        tried = scale if attempt is None else 2 * middle / np.float32(levels + attempt)
        start = minimum if attempt is None else middle - tried * np.float32(levels / 2)
        _codes(x, tried, start, levels, codes)
        sums, squares, products = codes.sum(axis=0), np.einsum("ij,ij->j", codes, codes), np.einsum("ij,ij->j", codes, x)
        spread, common = BLOCK * squares - sums * sums, BLOCK * products - total * sums
        slope = np.where(spread > 0, common / np.maximum(spread, 1), 0)
        gain = common * slope  # 32 * (squared error of the best constant - that of the line)
        better = gain > best
        best = np.where(better, gain, best)
        scale, minimum = np.where(better, slope, scale), np.where(better, (total - slope * sums) / BLOCK, minimum)
    return scale, minimum


def _codes(x: F32, scale: F32, minimum: F32, levels: int, out: F32) -> F32:
    """Compute the nearest code of each weight into `out`."""
    np.subtract(x, minimum, out=out)
    np.multiply(out, _inverse(scale), out=out)
    np.rint(out, out=out)
    return np.clip(out, 0, levels, out=out)


def _inverse(scale: F32) -> F32:
    """Return 1 / scale, or 0 if the scale is so small that 1 / scale could overflow: such a scale is 0 in float16."""
    inverse: F32 = np.divide(1, scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
    return inverse


def _half_bytes(values: F32) -> U8:
    """Convert `[n, 1]` values to the bytes `[n, 2]` of float16. Values that are too large become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint8)


_KINDS: Mapping[str, Callable[[F32], U8]] = {"Q8_0": _q8_0, "Q4_1": _q4_1}
