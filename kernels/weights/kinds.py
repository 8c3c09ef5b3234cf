"""GGUF's quantised kinds: how a block lies in the file, and what its weights are.

Layouts after ggml's `ggml-common.h` and `ggml-quants.c` (https://github.com/ggml-org/ggml). A row of weights is a run of blocks, a
block one or several groups, a group 16 or 32 weights with a scale (and a minimum) of its own. Without minima a weight is
`scale * (code - middle)`, with minima `scale * code + minimum`. Scales are a float16, or one times a signed integer of eight bits;
codes have eight bits, or six beside such scales: float32 holds `scale * code` exactly, and a minimum costs one rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockKind:
    """One kind. Its functions take blocks `[n, size]`."""

    weights: int
    """In a block."""
    size: int
    """Bytes of a block."""
    group: int
    """Weights that share a scale."""
    bits: int
    """4 or 8: of a code in the form that is computed on."""
    middle: int
    """The code of a zero weight; with minima the code in the middle of their range."""
    codes: Callable[[U8], U8]
    """`[n, weights]`."""
    scale: Callable[[U8], F32]
    """`[n, weights / group]`; not finite: damaged."""
    minimum: Callable[[U8], F32] | None = None
    """`[n, weights / group]`; None: the kind has none."""


def _half(blocks: U8, first: int) -> F32:
    """The float16 at byte `first` of each block: `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: U8, run: int = 16) -> U8:
    """ggml's order: of every `run` bytes first all low halves, then all high ones. `[n, bytes]` to `[n, 2 * bytes]`."""
    runs = packed.reshape(len(packed), -1, run)
    codes = np.empty((len(packed), runs.shape[1], 2, run), np.uint8)
    np.bitwise_and(runs, 15, out=codes[:, :, 0])
    np.right_shift(runs, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def _fifth_bits(low: U8, packed: U8) -> U8:
    """Codes 0..31 `[n, 32]`: the fifth bit of column k is bit k of four bytes."""
    low |= np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)
    return low


def _q5_k_codes(blocks: U8) -> U8:
    """Codes 0..31: the fifth bit of weight k of group g is bit g of byte k."""
    low = _nibbles(blocks[:, 48:], 32)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    low |= (((blocks[:, None, 16:48] >> bits) & 1) << np.uint8(4)).reshape(low.shape)
    return low


def _q6_k_codes(blocks: U8) -> U8:
    """Codes 0..63, in two halves of 128 weights: four low bits each in 64 bytes, two high bits each in 32."""
    codes = np.empty((len(blocks), 2, 4, 32), np.uint8)
    four, two = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    np.bitwise_and(four, 15, out=codes[:, :, :2])
    np.right_shift(four, 4, out=codes[:, :, 2:])
    for quarter in range(4):
        codes[:, :, quarter] |= ((two >> np.uint8(2 * quarter)) & 3) << np.uint8(4)
    return codes.reshape(-1, 256)


def _q6_k_scale(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32) * _half(blocks, 208)


def _k_scale(blocks: U8) -> F32:
    """Eight scales: six bits each, times the block's own."""
    packed = blocks[:, 4:16]
    low, high = packed[:, :4] & 63, (packed[:, 8:] & 15) | ((packed[:, :4] >> 2) & 48)
    return np.concatenate([low, high], axis=1).astype(np.float32) * _half(blocks, 0)


def _k_minimum(blocks: U8) -> F32:
    """Eight minima, none above zero: six bits each, times the block's own."""
    packed = blocks[:, 4:16]
    low, high = packed[:, 4:8] & 63, (packed[:, 8:] >> 4) | ((packed[:, 4:8] >> 2) & 48)
    return np.concatenate([low, high], axis=1).astype(np.float32) * -_half(blocks, 2)


def _power(blocks: U8) -> F32:
    """`2^(e - 128)` by the block's first byte, exact where that is subnormal.

    It is half of OCP's E8M0 scale, since the codes are doubled (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
    255 is NaN there; 253 and 254 are infinite here, since twelve times them is.
    """
    exponents = np.arange(256) - 128
    powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
    powers[253:] = np.inf, np.inf, np.nan
    return powers[blocks[:, :1]]


def _table(values: tuple[int, ...]) -> U8:
    """Two codes for each byte, `[256, 2]`: values + 128."""
    codes = np.array(values, np.int16) + 128
    byte = np.arange(256)
    return np.stack([codes[byte & 15], codes[byte >> 4]], axis=1).astype(np.uint8)


def _looked_up(table: U8, packed: U8) -> U8:
    """`[n, 16]` to `[n, 32]`, in ggml's order."""
    return np.concatenate([table[:, 0][packed], table[:, 1][packed]], axis=1)


_IQ4_NL = _table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1 = _table((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
"""MXFP4's values, doubled."""

BLOCK_KINDS: dict[str, BlockKind] = {
    "Q4_0": BlockKind(32, 18, 32, 4, 8, lambda b: _nibbles(b[:, 2:]), lambda b: _half(b, 0)),
    "Q4_1": BlockKind(32, 20, 32, 4, 8, lambda b: _nibbles(b[:, 4:]), lambda b: _half(b, 0), lambda b: _half(b, 2)),
    "Q5_0": BlockKind(32, 22, 32, 8, 16, lambda b: _fifth_bits(_nibbles(b[:, 6:]), b[:, 2:6]), lambda b: _half(b, 0)),
    "Q5_1": BlockKind(
        32, 24, 32, 8, 16, lambda b: _fifth_bits(_nibbles(b[:, 8:]), b[:, 4:8]), lambda b: _half(b, 0), lambda b: _half(b, 2)
    ),
    "Q8_0": BlockKind(32, 34, 32, 8, 128, lambda b: b[:, 2:] ^ np.uint8(128), lambda b: _half(b, 0)),
    "Q4_K": BlockKind(256, 144, 32, 4, 8, lambda b: _nibbles(b[:, 16:], 32), _k_scale, _k_minimum),
    "Q5_K": BlockKind(256, 176, 32, 8, 16, _q5_k_codes, _k_scale, _k_minimum),
    "Q6_K": BlockKind(256, 210, 16, 8, 32, _q6_k_codes, _q6_k_scale),
    "IQ4_NL": BlockKind(32, 18, 32, 8, 128, lambda b: _looked_up(_IQ4_NL, b[:, 2:]), lambda b: _half(b, 0)),
    "MXFP4": BlockKind(32, 17, 32, 8, 128, lambda b: _looked_up(_E2M1, b[:, 1:]), _power),
}
