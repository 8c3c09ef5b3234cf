"""Reads weights: as float32, or as the matrices that both backends compute with.

Reading a tensor also checks it for NaN and infinity, which would silently make every answer NaN.
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
    "expert_matrix",
    "load_matrix",
    "load_stacked",
    "slice_rows",
    "unpack_codes",
    "widen_bf16",
]

CHUNK = 1 << 18
"""Weights unpacked at a time. The temporary arrays for them fit in the processor's cache and stay below 4 MB."""

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]
_FLOATS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
"""Float kind -> (unsigned type of the same size, bits of infinity, which are the exponent's bits)."""
KINDS = (*_FLOATS, *BLOCK_KINDS)
"""All kinds that can be read."""


def dequantise(tensor: Tensor) -> F32:
    """Read a whole tensor as float32.

    Returns: an array of the tensor's shape; a view if the tensor is F32.
    Raises: ModelFileError for an unknown kind, a wrong size, or a weight that is not finite.
    """
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
    """Read some rows of a `[rows, columns]` tensor as float32, without the other rows. Raises: ModelFileError."""
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
    """Read a `[rows, columns]` tensor as a matrix; a quantised tensor stays quantised. Raises: ModelFileError."""
    return load_stacked([tensor])[0]


def load_stacked(tensors: Sequence[Tensor]) -> tuple[Matrix, ...]:
    """Read `[rows, columns]` tensors and stack their rows.

    Returns: one matrix if all tensors are quantised in the same form (bits, group size, with or without minima) and have the same
    width, otherwise one matrix for each tensor.
    Raises: ModelFileError.
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


def expert_matrix(tensor: Tensor, index: int) -> Tensor:
    """Return one expert's matrix `[rows, columns]` of a tensor `[experts, rows, columns]`, as a view. Raises: ModelFileError."""
    if len(tensor.shape) != 3 or not 0 <= index < tensor.shape[0]:
        raise ModelFileError(f"tensor {tensor.name} of shape {tensor.shape} has no expert {index}")
    size, rest = divmod(tensor.data.nbytes, tensor.shape[0])
    if rest:
        raise _broken(tensor)
    return Tensor(f"{tensor.name}[{index}]", tensor.kind, tensor.shape[1:], tensor.data[index * size : (index + 1) * size])


def slice_rows(tensor: Tensor, first: int, last: int) -> Tensor:
    """Return rows `[first, last)` of a matrix as a view. A `last` above the number of rows means all rows from `first` on."""
    rows, columns = _matrix_shape(tensor)
    last = min(last, rows)
    size = len(tensor.data) // rows
    return Tensor(tensor.name, tensor.kind, (last - first, columns), tensor.data[first * size : last * size])


def check_finite(tensor: Tensor) -> None:
    """Check that all weights are finite, without unpacking them. Raises: ModelFileError, also for a tensor of the wrong size."""
    kind = _kind(tensor)
    if kind is None:
        _check_bits(tensor)
        return
    blocks = _blocks(tensor, kind)
    for part in _parts(len(blocks), kind):
        _scales(tensor, kind, blocks[part])


def widen_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """Convert BF16, the upper half of a float32, to float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _load_blocks(tensors: Sequence[Tensor], kinds: Sequence[BlockKind]) -> BlockMatrix:
    """Stack quantised tensors of the same form and width into one matrix."""
    first = kinds[0]
    views = [_blocks(tensor, kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    rows, groups = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1] // first.group
    codes = np.empty((rows, groups, first.group * first.bits // 8), np.uint8)
    scale = np.empty((rows, groups), np.float32)
    shift = None if first.minimum is None else np.empty_like(scale)
    start = 0
    for tensor, kind, blocks in zip(tensors, kinds, views, strict=True):
        rows_of = slice(start, start + tensor.shape[0])
        _fill(tensor, kind, blocks, codes[rows_of], scale[rows_of], None if shift is None else shift[rows_of])
        start += tensor.shape[0]
    return BlockMatrix(first.bits, first.group, codes, scale, shift)


def _fill(tensor: Tensor, kind: BlockKind, blocks: U8, codes: U8, scale: F32, shift: F32 | None) -> None:
    """Convert a tensor's blocks into the arrays of a `BlockMatrix`, a part at a time."""
    flat_codes, flat_scale = codes.reshape(len(blocks), -1), scale.reshape(len(blocks), -1)
    for part in _parts(len(blocks), kind):
        scales, minima = _scales(tensor, kind, blocks[part])
        flat_scale[part] = scales
        if shift is not None and minima is not None:
            shift.reshape(len(blocks), -1)[part] = minima + kind.middle * scales
        unpacked = kind.codes(blocks[part])
        if kind.bits == 4:
            pairs = unpacked.view("<u2")  # the even column's code is the low byte, the odd column's the high byte
            flat_codes[part] = (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
        else:
            np.add(unpacked, np.uint8(128 - kind.middle), out=flat_codes[part])


def _unpack(tensor: Tensor, kind: BlockKind, blocks: U8, values: F32) -> None:
    """Compute the weights of blocks into `values` `[n, weights]`."""
    scales, minima = _scales(tensor, kind, blocks)
    values[:] = kind.codes(blocks)
    if minima is None:
        values -= kind.middle
    groups = values.reshape(len(blocks), -1, kind.group)
    groups *= scales[:, :, None]
    if minima is not None:
        groups += minima[:, :, None]


def _scales(tensor: Tensor, kind: BlockKind, blocks: U8) -> tuple[F32, F32 | None]:
    """Extract scales and minima, each `[n, groups]`. Raises: ModelFileError if one is not finite."""
    with np.errstate(invalid="ignore"):  # a damaged file may have infinity times zero
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
    """View a float tensor's data in its shape; BF16 as uint16."""
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.kind]
    return _bits(tensor).view(kind).reshape(tensor.shape)


def _widened(values: Floats) -> F32:
    return widen_bf16(values.view(np.uint16)) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


def _check_bits(tensor: Tensor) -> None:
    """Check that no float is NaN or infinite, that is, has all bits of its exponent set. Raises: ModelFileError."""
    bits, infinity = _bits(tensor), _FLOATS[tensor.kind][1]
    for start in range(0, len(bits), CHUNK):
        exponents = bits[start : start + CHUNK] & bits.dtype.type(infinity)
        if exponents.max() == infinity:
            raise _not_finite(tensor)


def _bits(tensor: Tensor) -> npt.NDArray[np.unsignedinteger]:
    """View a float tensor's data as a flat array of unsigned integers, aligned or not. Raises: ModelFileError for a wrong size."""
    unsigned = np.dtype(_FLOATS[tensor.kind][0])
    if tensor.data.nbytes != prod(tensor.shape) * unsigned.itemsize or not tensor.data:
        raise _broken(tensor)
    return np.frombuffer(tensor.data, unsigned)


def _blocks(tensor: Tensor, kind: BlockKind) -> U8:
    """View a tensor's data as blocks `[n, size]`. Raises: ModelFileError if its size does not match its shape."""
    count = prod(tensor.shape) // kind.weights
    if tensor.shape[-1] % kind.weights or tensor.data.nbytes != count * kind.size or not count:
        raise _broken(tensor)
    return np.frombuffer(tensor.data, np.uint8).reshape(count, kind.size)


def _kind(tensor: Tensor) -> BlockKind | None:
    """Return a tensor's block kind; None if it holds floats. Raises: ModelFileError for an unknown kind."""
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
        raise ModelFileError(f"tensor {tensor.name} is not a matrix: its shape is {tensor.shape}")
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
