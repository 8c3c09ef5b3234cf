"""GGUF's quantised tensor types, called kinds: the layout of their blocks, and how to compute weights from them.

The layouts follow ggml's `ggml-common.h` and `ggml-quants.c` (https://github.com/ggml-org/ggml). A row of weights consists of
blocks, a block of one or several groups, and a group of 16 or 32 weights that share a scale (and a minimum). In kinds without
minima a weight is `scale * (code - middle)`, in kinds with minima `scale * code + minimum`.

A scale is a float16, a power of two (MXFP4), or a float16 times an integer of at most 8 bits. A code has at most 8 bits, or at most
6 bits with a scale of the last form. So float32 represents `scale * code` exactly, and adding a minimum rounds once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockKind:
    """The layout of one kind. Its functions take blocks `[n, size]`."""

    weights: int
    """Number of weights in a block."""
    size: int
    """Bytes of a block."""
    group: int
    """Number of weights that share a scale."""
    bits: int
    """Bits of a code in a `BlockMatrix`: 4 or 8."""
    middle: int
    """The code of a zero weight; in kinds with minima, the middle of the range of codes."""
    codes: Callable[[U8], U8]
    """Extracts codes `[n, weights]`."""
    scale: Callable[[U8], F32]
    """Extracts scales `[n, weights / group]`. A scale that is not finite means that the file is damaged."""
    minimum: Callable[[U8], F32] | None = None
    """Extracts minima `[n, weights / group]`. None: the kind has no minima."""

    @property
    def group_bits(self) -> float:
        """Bits per weight of one float32 for each group, such as the scale."""
        return 32 / self.group


def _half(blocks: U8, first: int) -> F32:
    """Read the float16 at byte `first` of each block. Returns: `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: U8, run: int = 16) -> U8:
    """Unpack 4-bit codes in ggml's order: for each `run` bytes, all low halves first, then all high halves.

    Returns: `[n, 2 * bytes]` for `packed` `[n, bytes]`.
    """
    runs = packed.reshape(len(packed), -1, run)
    codes = np.empty((len(packed), runs.shape[1], 2, run), np.uint8)
    np.bitwise_and(runs, 15, out=codes[:, :, 0])
    np.right_shift(runs, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def _fifth_bits(low: U8, packed: U8) -> U8:
    """Add the fifth bits to 4-bit codes `[n, 32]`, in place: the fifth bit of code k is bit k of the four bytes `packed`."""
    low |= np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)
    return low


def _q5_k_codes(blocks: U8) -> U8:
    """Extract the 5-bit codes of Q5_K: the fifth bit of weight k of group g is bit g of byte 16 + k."""
    low = _nibbles(blocks[:, 48:], 32)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    low |= (((blocks[:, None, 16:48] >> bits) & 1) << np.uint8(4)).reshape(low.shape)
    return low


def _q6_k_codes(blocks: U8) -> U8:
    """Extract the 6-bit codes of Q6_K.

    For each half of a block, 128 weights, the low four bits of the codes are in 64 bytes and the high two bits in 32 bytes.
    """
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
    """Extract the eight scales of a K block: six bits each, times the block's float16 scale."""
    packed = blocks[:, 4:16]
    low, high = packed[:, :4] & 63, (packed[:, 8:] & 15) | ((packed[:, :4] >> 2) & 48)
    return np.concatenate([low, high], axis=1).astype(np.float32) * _half(blocks, 0)


def _k_minimum(blocks: U8) -> F32:
    """Extract the eight minima of a K block: six bits each, times the negated float16 at byte 2 of the block."""
    packed = blocks[:, 4:16]
    low, high = packed[:, 4:8] & 63, (packed[:, 8:] >> 4) | ((packed[:, 4:8] >> 2) & 48)
    return np.concatenate([low, high], axis=1).astype(np.float32) * -_half(blocks, 2)


def _power(blocks: U8) -> F32:
    """Compute `2^(e - 128)`, where `e` is the block's first byte; exact also for subnormal results.

    This is half of OCP's E8M0 scale, since `_E2M1` has doubled values (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
    An `e` of 255 is NaN in that specification. For 253 and 254 the result is infinite, since its product with 12, the largest value
    of `_E2M1`, would overflow.
    """
    exponents = np.arange(256) - 128
    powers = np.ldexp(np.float32(1), exponents).astype(np.float32)
    powers[253:] = np.inf, np.inf, np.nan
    return powers[blocks[:, :1]]


def _table(values: tuple[int, ...]) -> U8:
    """Make a table `[256, 2]` from a byte to the codes of its low and its high half. A code is a value of `values` plus 128."""
    codes = np.array(values, np.int16) + 128
    byte = np.arange(256)
    return np.stack([codes[byte & 15], codes[byte >> 4]], axis=1).astype(np.uint8)


def _looked_up(table: U8, packed: U8) -> U8:
    """Look up the codes of packed bytes, in ggml's order: `[n, 16]` to `[n, 32]`."""
    return np.concatenate([table[:, 0][packed], table[:, 1][packed]], axis=1)


_IQ4_NL = _table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1 = _table((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
"""The values of MXFP4's 4-bit floats, times two to make them integers."""

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
