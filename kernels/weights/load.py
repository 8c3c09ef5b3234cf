"""Reads weights: to float32, or to the form that both backends compute on.

A weight that is NaN or infinite is found when its tensor is read: it would silently make every answer NaN.
"""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from meshd.errors import ModelFileError
from meshd.kernels.weights.kinds import BLOCK_KINDS, F32, U8, BlockKind
from meshd.kernels.weights.matrices import BlockMatrix, DenseMatrix, Matrix, unpack_codes
from meshd.types import Tensor

__all__ = [
    "F32",
    "KINDS",
    "BlockMatrix",
    "DenseMatrix",
    "Matrix",
    "check_finite",
    "dequantise",
    "dequantise_rows",
    "expert",
    "load_matrix",
    "load_stacked",
    "some_rows",
    "unpack_codes",
    "widen_bf16",
]

CHUNK = 1 << 18
"""Weights unpacked at a time: what they need beside the result stays in the cache, and under 4 MB."""

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]
_FLOATS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
"""(the type that holds its bits, infinity's)."""
KINDS = (*_FLOATS, *BLOCK_KINDS)
"""All that can be read."""


def dequantise(tensor: Tensor) -> F32:
    """All of a tensor as float32, of its shape; F32 as a view. Raises: ModelFileError for a wrong kind, size or weight."""
    kind = _kind(tensor)
    if kind is None:
        _check_bits(tensor)
        return np.require(_widened(_float_view(tensor)), requirements="A")
    blocks = _blocks(tensor, kind)
    values = np.empty((len(blocks), kind.weights), np.float32)
    for part in _parts(len(blocks), kind):
        _unpack(tensor, kind, blocks[part], values[part])
    return values.reshape(tensor.shape)


def dequantise_rows(tensor: Tensor, rows: npt.NDArray[np.integer]) -> F32:
    """`tensor[rows]` of a `[rows, columns]` tensor: only these rows are read. Raises: ModelFileError."""
    kind = _kind(tensor)
    height, width = _matrix_shape(tensor)
    if kind is None:
        values = _widened(_float_view(tensor)[rows])
        if not np.isfinite(values).all():
            raise _not_finite(tensor)
        return values
    blocks = _blocks(tensor, kind).reshape(height, -1, kind.size)[rows].reshape(-1, kind.size)
    values = np.empty((len(blocks), kind.weights), np.float32)
    _unpack(tensor, kind, blocks, values)
    return values.reshape(len(rows), width)


def load_matrix(tensor: Tensor) -> Matrix:
    """A `[rows, columns]` tensor in the form that is computed on; a quantised one stays so. Raises: ModelFileError."""
    return load_stacked([tensor])[0]


def load_stacked(tensors: Sequence[Tensor]) -> tuple[Matrix, ...]:
    """`[rows, columns]` tensors under one another: one matrix if their forms and widths are alike, else one for each.

    Memory is taken once, for the result. Raises: ModelFileError.
    """
    for tensor in tensors:
        _matrix_shape(tensor)
    kinds = [_kind(tensor) for tensor in tensors]
    blocked = [kind for kind in kinds if kind is not None]
    forms = {(kind.bits, kind.group, kind.minimum is None, tensor.shape[1]) for kind, tensor in zip(blocked, tensors, strict=False)}
    if len(blocked) == len(tensors) and len(forms) == 1:
        return (_load_blocks(tensors, blocked),)
    pairs = zip(tensors, kinds, strict=True)
    return tuple(_load_floats(tensor) if kind is None else _load_blocks([tensor], [kind]) for tensor, kind in pairs)


def expert(tensor: Tensor, index: int) -> Tensor:
    """One matrix `[rows, columns]` of a tensor `[experts, rows, columns]`, not copied. Raises: ModelFileError."""
    if len(tensor.shape) != 3 or not 0 <= index < tensor.shape[0]:
        raise ModelFileError(f"tensor {tensor.name} of shape {tensor.shape} has no expert {index}")
    size, rest = divmod(tensor.data.nbytes, tensor.shape[0])
    if rest:
        raise _broken(tensor)
    return Tensor(f"{tensor.name}[{index}]", tensor.kind, tensor.shape[1:], tensor.data[index * size : (index + 1) * size])


def some_rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """Rows `[first, last)` of a matrix, where they lie; a last row beyond the end is the end."""
    rows, columns = _matrix_shape(tensor)
    last = min(last, rows)
    size = len(tensor.data) // rows
    return Tensor(tensor.name, tensor.kind, (last - first, columns), tensor.data[first * size : last * size])


def check_finite(tensor: Tensor) -> None:
    """Look for NaN and infinite weights without unpacking them. Raises: ModelFileError if there are, or the tensor is torn."""
    kind = _kind(tensor)
    if kind is None:
        _check_bits(tensor)
        return
    blocks = _blocks(tensor, kind)
    for part in _parts(len(blocks), kind):
        _scales(tensor, kind, blocks[part])


def widen_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """The upper half of a float32 to the float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _load_blocks(tensors: Sequence[Tensor], kinds: Sequence[BlockKind]) -> BlockMatrix:
    """Tensors of one form and width."""
    first = kinds[0]
    views = [_blocks(tensor, kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    rows, groups = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1] // first.group
    codes = np.empty((rows, groups, first.group * first.bits // 8), np.uint8)
    scale = np.empty((rows, groups), np.float32)
    shift = None if first.minimum is None else np.empty_like(scale)
    start = 0
    for tensor, kind, blocks in zip(tensors, kinds, views, strict=True):
        under = slice(start, start + tensor.shape[0])
        _fill(tensor, kind, blocks, codes[under], scale[under], None if shift is None else shift[under])
        start += tensor.shape[0]
    return BlockMatrix(first.bits, first.group, codes, scale, shift)


def _fill(tensor: Tensor, kind: BlockKind, blocks: U8, codes: U8, scale: F32, shift: F32 | None) -> None:
    """Blocks to the form's arrays, a part at a time."""
    flat_codes, flat_scale = codes.reshape(len(blocks), -1), scale.reshape(len(blocks), -1)
    for part in _parts(len(blocks), kind):
        scales, minima = _scales(tensor, kind, blocks[part])
        flat_scale[part] = scales
        if shift is not None and minima is not None:
            shift.reshape(len(blocks), -1)[part] = minima + kind.middle * scales
        unpacked = kind.codes(blocks[part])
        if kind.bits == 4:
            pairs = unpacked.view("<u2")  # the even code below, the odd one above
            flat_codes[part] = (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
        else:
            np.add(unpacked, np.uint8(128 - kind.middle), out=flat_codes[part])


def _unpack(tensor: Tensor, kind: BlockKind, blocks: U8, values: F32) -> None:
    """Blocks to weights `[n, weights]`."""
    scales, minima = _scales(tensor, kind, blocks)
    values[:] = kind.codes(blocks)
    if minima is None:
        values -= kind.middle
    groups = values.reshape(len(blocks), -1, kind.group)
    groups *= scales[:, :, None]
    if minima is not None:
        groups += minima[:, :, None]


def _scales(tensor: Tensor, kind: BlockKind, blocks: U8) -> tuple[F32, F32 | None]:
    """(scales, minima), each `[n, groups]`. Raises: ModelFileError if one is not finite."""
    with np.errstate(invalid="ignore"):  # infinity times a zero
        scales = kind.scale(blocks)
        minima = None if kind.minimum is None else kind.minimum(blocks)
    if not np.isfinite(scales).all() or (minima is not None and not np.isfinite(minima).all()):
        raise _not_finite(tensor)
    return scales, minima


def _parts(blocks: int, kind: BlockKind) -> Iterator[slice]:
    step = CHUNK // kind.weights
    return (slice(start, start + step) for start in range(0, blocks, step))


def _load_floats(tensor: Tensor) -> DenseMatrix:
    _check_bits(tensor)
    return DenseMatrix(np.require(_float_view(tensor), requirements="A"))


def _float_view(tensor: Tensor) -> Floats:
    """A float tensor where it lies, of its shape; BF16's bits in uint16."""
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.kind]
    return _bits(tensor).view(kind).reshape(tensor.shape)


def _widened(values: Floats) -> F32:
    return widen_bf16(values.view(np.uint16)) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


def _check_bits(tensor: Tensor) -> None:
    """Raises: ModelFileError if a float is NaN or infinite: if all bits of its exponent are set."""
    bits, infinity = _bits(tensor), _FLOATS[tensor.kind][1]
    for start in range(0, len(bits), CHUNK):
        exponents = bits[start : start + CHUNK] & bits.dtype.type(infinity)
        if exponents.max() == infinity:
            raise _not_finite(tensor)


def _bits(tensor: Tensor) -> npt.NDArray[np.unsignedinteger]:
    """A float tensor's bits in one row, where they lie, aligned or not. Raises: ModelFileError if the size is wrong."""
    unsigned = np.dtype(_FLOATS[tensor.kind][0])
    if tensor.data.nbytes != prod(tensor.shape) * unsigned.itemsize or not tensor.data:
        raise _broken(tensor)
    return np.frombuffer(tensor.data, unsigned)


def _blocks(tensor: Tensor, kind: BlockKind) -> U8:
    """`[n, size]`. Raises: ModelFileError if the size does not fit the shape."""
    count = prod(tensor.shape) // kind.weights
    if tensor.shape[-1] % kind.weights or tensor.data.nbytes != count * kind.size or not count:
        raise _broken(tensor)
    return np.frombuffer(tensor.data, np.uint8).reshape(count, kind.size)


def _kind(tensor: Tensor) -> BlockKind | None:
    """None: floats. Raises: ModelFileError for a kind that is not known here."""
    if tensor.kind in _FLOATS:
        return None
    kind = BLOCK_KINDS.get(tensor.kind)
    if kind is None:
        raise ModelFileError(
            f"tensor {tensor.name} can't be read: its kind {tensor.kind} is unknown here",
            hint=f"use a model file with weights in {', '.join(KINDS)}",
        )
    return kind


def _matrix_shape(tensor: Tensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise ModelFileError(f"tensor {tensor.name} is no matrix: its shape is {tensor.shape}")
    return tensor.shape[0], tensor.shape[1]


def _broken(tensor: Tensor) -> ModelFileError:
    return ModelFileError(
        f"tensor {tensor.name} is broken: {tensor.data.nbytes} bytes do not make {tensor.kind} of shape {tensor.shape}",
        hint="the file is damaged: fetch it again",
    )


def _not_finite(tensor: Tensor) -> ModelFileError:
    return ModelFileError(
        f"tensor {tensor.name} can't be computed with: some of its weights are NaN or infinite",
        hint="the file is damaged: fetch it again",
    )
