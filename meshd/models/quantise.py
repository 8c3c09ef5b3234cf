"""Weights to GGUF's block kinds: what `--quant` makes of a model as it is imported.

Layouts after ggml's `ggml-common.h`. Q8_0 rounds to 1/127 of a block's largest weight. Q4_1 has a scale and a minimum; both are
fitted to the block by least squares, twice, after the codes of the plain rounding (the idea of ggml's `make_qkx2_quants`).
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

BLOCK = 32
_FITS = 2
_HALVES = {"Q8_0": 2, "Q4_1": 4}
"""Bytes of scale and minimum at the start of a block."""


def quantise(values: F32, kind: str) -> U8:
    """A multiple of 32 weights, flat, to whole blocks, flat. Raises: ValueError if a block's scale is no finite float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = _KINDS[kind](values.reshape(-1, BLOCK))
    halves = np.ascontiguousarray(blocks[:, : _HALVES[kind]]).view(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"a block of its weights is too large for {kind}")
    return blocks.reshape(-1)


def _q8_0(blocks: F32) -> U8:
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    inverse = _inverse(scale.astype(np.float32))
    codes = np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)


def _q4_1(blocks: F32) -> U8:
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale, minimum = (high - low) / 15, low
    for _ in range(_FITS):
        scale, minimum = _fitted(blocks, _codes(blocks, scale, minimum), scale, minimum)
    halves = scale.astype(np.float16), minimum.astype(np.float16)
    codes: U8 = _codes(blocks, halves[0].astype(np.float32), halves[1].astype(np.float32)).astype(np.uint8)
    packed: U8 = codes[:, :16] | (codes[:, 16:] << np.uint8(4))
    return np.concatenate([halves[0].view(np.uint8), halves[1].view(np.uint8), packed], axis=1)


def _codes(blocks: F32, scale: F32, minimum: F32) -> F32:
    codes: F32 = np.clip(np.rint((blocks - minimum) * _inverse(scale)), 0, 15)
    return codes


def _fitted(blocks: F32, codes: F32, scale: F32, minimum: F32) -> tuple[F32, F32]:
    """The scale and minimum that come nearest to the weights with these codes: a straight line through them."""
    mean, middle = codes.mean(axis=1, keepdims=True), blocks.mean(axis=1, keepdims=True)
    spread = np.square(codes - mean).sum(axis=1, keepdims=True)
    slope = ((codes - mean) * (blocks - middle)).sum(axis=1, keepdims=True) / np.maximum(spread, np.float32(1e-12))
    good = (spread > 0) & (slope > 0)
    return np.where(good, slope, scale), np.where(good, middle - slope * mean, minimum)


def _inverse(scale: F32) -> F32:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


_KINDS: Mapping[str, Callable[[F32], U8]] = {"Q8_0": _q8_0, "Q4_1": _q4_1}
