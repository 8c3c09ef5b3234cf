"""The plan of an import: which tensors of a Hugging Face folder become which tensors of a GGUF file, and how.

A transform is a list of steps separated by `|`, applied from left to right to each source:

    add_one                        every weight plus 1, in float32 (Gemma's norms)
    rope_interleave:HEADS          rows of Q or K from half-split to interleaved pairs, as llama.cpp's `llama` architecture has them
    transpose                      the last two axes swapped
    slice:AXIS:START:STOP:STEP     as numpy's, an empty field being None
    mxfp4                          the two sources are gpt-oss's blocks of nibbles `[..., blocks, 16]` and scales `[..., blocks]`

All but `add_one` only reorder: `chunks_of` reads a source a few rows at a time, not whole.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue

Array = npt.NDArray[Any]
TENSOR_CHUNK_BYTES = 1 << 20
"""About so much of a tensor is in memory at a time."""


@dataclass(frozen=True, slots=True)
class ImportTensor:
    """One tensor of the GGUF file."""

    name: str
    """Its name in GGUF, e.g. `blk.0.attn_q.weight`."""
    sources: tuple[str, ...]
    """Names in the folder: one, or several to stack along a new first axis (experts)."""
    shape: tuple[int, ...]
    """Row-major, after the transform and the stacking."""
    transform: str = ""
    values: tuple[float, ...] = ()
    """Its values, as F32, if it has no source."""


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """Everything except the tokenizer's metadata."""

    metadata: dict[str, MetadataValue]
    """The architecture's keys."""
    tensors: tuple[ImportTensor, ...] = field(default=())


def adds_one(transform: str) -> bool:
    """Whether the transform changes values, not only their order."""
    return "add_one" in transform.split("|")


def is_mxfp4(transform: str) -> bool:
    """Whether the sources are MXFP4's blocks and scales."""
    return transform.split("|")[0] == "mxfp4"


def mxfp4_blocks(nibbles: Array, scales: Array) -> Array:
    """Bytes of ggml's blocks, flat: the scale, then weights 0 to 15 in the low halves and 16 to 31 in the high ones.

    Hugging Face has weights 0 and 1 in the first byte, 2 and 3 in the second. Raises: ValueError for a scale that is no number.
    """
    packed = np.ascontiguousarray(nibbles).reshape(-1, 16)
    exponents = np.ascontiguousarray(scales).reshape(-1, 1)
    if (exponents == 0xFF).any():  # of 8-bit exponents, the one that is no number
        raise ValueError("a scale is no number")
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 32)
    return np.concatenate([exponents, codes[:, :16] | codes[:, 16:] << 4], axis=1).reshape(-1)


def view_of(array: Array, transform: str) -> Array:
    """The array whose elements, in row-major order, are the transformed tensor's; its own shape may have more axes.

    Raises: ModelFileError for a step that does not fit the array, or is none.
    """
    try:
        for step in filter(None, transform.split("|")):
            array = _step(array, *step.split(":"))
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ModelFileError(f"transform {transform!r} does not fit shape {array.shape}: {error}") from error
    return array


def _step(array: Array, name: str, *given: str) -> Array:
    match name, given:
        case (("add_one" | "mxfp4"), ()):
            return array
        case "transpose", ():
            return array.swapaxes(-2, -1)
        case "rope_interleave", (heads,):
            rows, *rest = array.shape
            return array.reshape(int(heads), 2, rows // int(heads) // 2, *rest).swapaxes(1, 2)
        case "slice", (axis, start, stop, step):
            cut = slice(*(int(bound) if bound else None for bound in (start, stop, step)))
            return array[(slice(None),) * (int(axis) % array.ndim) + (cut,)]
        case _:
            raise ValueError(f"{name} with {len(given)} numbers is no step")


def view_shape(shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    """The shape that `view_of` gives an array of `shape`, without the array. Raises: ModelFileError as `view_of`."""
    return view_of(np.broadcast_to(np.uint8(0), shape), transform).shape


def chunks_of(shape: tuple[int, ...], itemsize: int, read: Callable[[int, int], Array], transform: str) -> Iterator[Array]:
    """The transformed tensor's elements in row-major order, flat, about a megabyte at a time.

    `read(start, stop)` gives rows of a source of `shape`. A source is read in blocks of rows that the transform keeps in order:
    whole heads for `rope_interleave`, whole matrices for `transpose`. Only a transform that mixes all rows reads the source whole.
    """
    rows = shape[0] if shape else 1
    unit = max(1, _rows_kept(shape, transform))
    most = TENSOR_CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize)
    step = max(unit, most // unit * unit)
    for start in range(0, max(1, rows), step):
        block = read(start, min(rows, start + step))
        head, bar, rest = transform.partition("|")
        if step < rows and head.startswith("rope_interleave"):
            head = f"rope_interleave:{len(block) // unit}"
        yield from flat_chunks(view_of(block, head + bar + rest))


def _rows_kept(shape: tuple[int, ...], transform: str) -> int:
    """The fewest rows that the transform moves as one: blocks of so many rows can be transformed one by one."""
    unit, axes = 1, len(shape)
    for index, step in enumerate(filter(None, transform.split("|"))):
        match step.split(":"):
            case ["rope_interleave", heads] if index == 0:
                unit, axes = shape[0] // int(heads), axes + 2
            case ["add_one" | "mxfp4"]:
                pass
            case ["transpose"] if axes > 2:
                pass
            case ["slice", axis, *_] if int(axis) % axes:
                pass
            case _:
                return shape[0] if shape else 1
    return unit


def flat_chunks(view: Array) -> Iterator[Array]:
    """A view's elements in row-major order, flat, a megabyte at a time."""
    if view.nbytes <= TENSOR_CHUNK_BYTES or view.ndim == 0:
        yield np.ascontiguousarray(view).reshape(-1)
    elif view.nbytes // len(view) > TENSOR_CHUNK_BYTES:
        for part in view:
            yield from flat_chunks(part)
    else:
        rows = max(1, TENSOR_CHUNK_BYTES * len(view) // view.nbytes)
        for first in range(0, len(view), rows):
            yield np.ascontiguousarray(view[first : first + rows]).reshape(-1)
