"""GGUF's block kinds: unpack, dequantise, and the one form that both backends compute on.

Layouts after ggml's `ggml-common.h` (https://github.com/ggml-org/ggml): a row of weights is a run of blocks, each with its own
scale (and offset). `w = scale * (code - zero) + shift` holds for every kind here, exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.errors import ModelFileError
from meshd.types import Tensor

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """Quantised `[rows, columns]`: `w[n, k] = scale[n, b] * (code[n, k] - zero) + shift[n, b]` with `b = k // block`."""

    bits: int
    """4 or 8."""
    block: int
    codes: U8
    """`[rows, blocks, block * bits / 8]`; 4-bit codes in pairs, the even column in the low half."""
    scale: F32
    """`[rows, blocks]`."""
    shift: F32 | None
    """`[rows, blocks]`; None: all zero."""

    @property
    def zero(self) -> int:
        """The code of a zero weight (without shift): 8 or 128."""
        return 1 << (self.bits - 1)

    @property
    def shape(self) -> tuple[int, int]:
        rows, blocks = self.scale.shape
        return rows, blocks * self.block

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.shift is None else self.shift.nbytes)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """`[rows, columns]` in full or half precision; BF16 as the upper half of a float32, in uint16."""

    values: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def bytes(self) -> int:
        return self.values.nbytes


Matrix = BlockMatrix | DenseMatrix


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a kind lies in memory: `weights` in `size` bytes, and what makes values of such blocks."""

    weights: int
    size: int
    values: Callable[[U8], F32]
    """`[n, size]` to `[n, weights]`."""
    matrix: Callable[[U8, int], Matrix]
    """(`[n, size]`, rows) to the form that is computed on."""


def dequantise(tensor: Tensor) -> F32:
    """All of a tensor as float32, of the tensor's shape. Raises: ModelFileError for a kind or size that is wrong."""
    layout = _layout(tensor)
    return layout.values(_blocks(tensor, layout)).reshape(tensor.shape)


def dequantise_rows(tensor: Tensor, rows: npt.NDArray[np.integer]) -> F32:
    """`tensor[rows]` of a `[rows, columns]` tensor: only these rows are read. Raises: ModelFileError."""
    layout = _layout(tensor)
    height, width = _matrix_shape(tensor)
    blocks = _blocks(tensor, layout).reshape(height, width // layout.weights, layout.size)
    return layout.values(blocks[rows].reshape(-1, layout.size)).reshape(len(rows), width)


def load_matrix(tensor: Tensor) -> Matrix:
    """A `[rows, columns]` tensor in the form that is computed on; a quantised one stays so. Raises: ModelFileError."""
    layout = _layout(tensor)
    rows, _ = _matrix_shape(tensor)
    return layout.matrix(_blocks(tensor, layout), rows)


def stack(matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
    """Matrices of equal width under one another: one matrix if they are alike, else they stay as they are."""
    first = matrices[0]
    if not isinstance(first, BlockMatrix):
        return tuple(matrices)
    alike: list[BlockMatrix] = [m for m in matrices if isinstance(m, BlockMatrix) and _form(m) == _form(first)]
    if len(alike) < len(matrices):
        return tuple(matrices)
    shift = None if first.shift is None else np.concatenate([m.shift for m in alike if m.shift is not None])
    codes, scale = np.concatenate([m.codes for m in alike]), np.concatenate([m.scale for m in alike])
    return (BlockMatrix(first.bits, first.block, codes, scale, shift),)


def unpack_codes(matrix: BlockMatrix) -> U8:
    """`[rows, columns]`, one code a byte."""
    if matrix.bits == 8:
        return matrix.codes.reshape(matrix.shape)
    pairs = np.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1)
    return pairs.reshape(matrix.shape)


def _form(matrix: BlockMatrix) -> tuple[int, int, bool]:
    return matrix.bits, matrix.block, matrix.shift is None


def _layout(tensor: Tensor) -> _Layout:
    layout = _LAYOUTS.get(tensor.kind)
    if layout is None:
        raise ModelFileError(
            f"tensor {tensor.name} can't be read: its kind {tensor.kind} is unknown here",
            hint=f"use a model file with weights in {', '.join(_LAYOUTS)}",
        )
    return layout


def _blocks(tensor: Tensor, layout: _Layout) -> U8:
    """`[n, size]`, checked against the shape."""
    data = np.frombuffer(tensor.data, np.uint8)
    count, rest = divmod(int(np.prod(tensor.shape)), layout.weights)
    if rest or tensor.shape[-1] % layout.weights or len(data) != count * layout.size:
        raise ModelFileError(f"tensor {tensor.name} is broken: {len(data)} bytes do not make {tensor.kind} of shape {tensor.shape}")
    return data.reshape(count, layout.size)


def _matrix_shape(tensor: Tensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise ModelFileError(f"tensor {tensor.name} is no matrix: its shape is {tensor.shape}")
    return tensor.shape[0], tensor.shape[1]


def _half(blocks: U8, first: int) -> F32:
    """The float16 at byte `first` of each block: `[n, 1]`."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """ggml's order, low halves first: `[n, 16]` to `[n, 32]`."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _pair(codes: U8) -> U8:
    """One code a byte to two, the even one in the low half."""
    paired: U8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return paired


def _plain(values: F32, rows: int) -> F32:
    """Per-block values `[n, 1]` to `[rows, blocks]`."""
    return np.ascontiguousarray(values.reshape(rows, -1))


def _bf16(blocks: U8) -> npt.NDArray[np.uint16]:
    return np.ascontiguousarray(blocks).view(np.uint16)


def widen_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """The upper half of a float32 to the float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _q4_0_matrix(blocks: U8, rows: int) -> BlockMatrix:
    codes = _pair(_nibbles(blocks[:, 2:]))
    return BlockMatrix(4, 32, codes.reshape(rows, -1, 16), _plain(_half(blocks, 0), rows), None)


def _q4_1_matrix(blocks: U8, rows: int) -> BlockMatrix:
    """`d q + m = d (q - 8) + (m + 8 d)`."""
    codes = _pair(_nibbles(blocks[:, 4:]))
    scale, minimum = _half(blocks, 0), _half(blocks, 2)
    return BlockMatrix(4, 32, codes.reshape(rows, -1, 16), _plain(scale, rows), _plain(minimum + 8 * scale, rows))


def _q8_0_matrix(blocks: U8, rows: int) -> BlockMatrix:
    codes = blocks[:, 2:] ^ np.uint8(0x80)  # a signed code + 128
    return BlockMatrix(8, 32, codes.reshape(rows, -1, 32), _plain(_half(blocks, 0), rows), None)


def _q6_k_codes(blocks: U8) -> tuple[U8, F32]:
    """Codes 0..63 `[n, 256]` and scales `[n, 16]`, one for 16 weights."""
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2)  # [n, 2, 128]
    two = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2)
    codes = (four | (two << 4)).reshape(-1, 256)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, scales * _half(blocks, 208)


def _q6_k_values(blocks: U8) -> F32:
    codes, scales = _q6_k_codes(blocks)
    return ((codes.astype(np.float32) - 32).reshape(-1, 16, 16) * scales[:, :, None]).reshape(-1, 256)


def _q6_k_matrix(blocks: U8, rows: int) -> BlockMatrix:
    codes, scales = _q6_k_codes(blocks)
    return BlockMatrix(8, 16, (codes + np.uint8(96)).reshape(rows, -1, 16), _plain(scales, rows), None)


_LAYOUTS: dict[str, _Layout] = {
    "F32": _Layout(1, 4, lambda b: b.view(np.float32), lambda b, rows: DenseMatrix(b.view(np.float32).reshape(rows, -1))),
    "F16": _Layout(
        1, 2, lambda b: b.view(np.float16).astype(np.float32), lambda b, rows: DenseMatrix(b.view(np.float16).reshape(rows, -1))
    ),
    "BF16": _Layout(1, 2, lambda b: widen_bf16(_bf16(b)), lambda b, rows: DenseMatrix(_bf16(b).reshape(rows, -1))),
    "Q4_0": _Layout(32, 18, lambda b: _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8), _q4_0_matrix),
    "Q4_1": _Layout(32, 20, lambda b: _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2), _q4_1_matrix),
    "Q8_0": _Layout(32, 34, lambda b: _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32), _q8_0_matrix),
    "Q6_K": _Layout(256, 210, _q6_k_values, _q6_k_matrix),
}
