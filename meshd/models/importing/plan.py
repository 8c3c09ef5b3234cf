"""The plan of an import: which tensors of a Hugging Face folder become which tensors of a GGUF file, and how.

A transform is a list of steps separated by `|`, applied from left to right to each source:

    add_one                        every weight plus 1, in float32 (Gemma's norms)
    rope_interleave:HEADS          rows of Q or K from half-split to interleaved pairs, as llama.cpp's `llama` architecture has them
    transpose                      the last two axes swapped
    slice:AXIS:START:STOP:STEP     as numpy's, an empty field being None
    mxfp4                          the two sources are gpt-oss's blocks of nibbles `[..., blocks, 16]` and scales `[..., blocks]`

All steps but `add_one` only select or reorder values. `chunks_of` reads a source a block of rows at a time.
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
"""Approximate size of the part of a tensor that is in memory at a time."""


@dataclass(frozen=True, slots=True)
class ImportTensor:
    """One tensor of the GGUF file."""

    name: str
    """The tensor's name in GGUF, e.g. `blk.0.attn_q.weight`."""
    sources: tuple[str, ...]
    """Names of tensors in the folder: one, or several to stack along a new first axis (experts). Empty: the tensor is `values`."""
    shape: tuple[int, ...]
    """Shape after the transform and the stacking, in row-major order."""
    transform: str = ""
    values: tuple[float, ...] = ()
    """The tensor's values, stored as F32, if it has no source."""


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """All that a GGUF file needs except the metadata of the tokenizer and the chat template."""

    metadata: dict[str, MetadataValue]
    """The architecture's keys."""
    tensors: tuple[ImportTensor, ...] = field(default=())
    left_out: tuple[str, ...] = ()
    """Names of the source's tensors that predict several tokens ahead, which meshd does not compute."""


def adds_one(transform: str) -> bool:
    """Whether the transform has the step `add_one`, the only one that changes values."""
    return "add_one" in transform.split("|")


def is_mxfp4(transform: str) -> bool:
    """Whether the sources are MXFP4's blocks and scales."""
    return transform.split("|")[0] == "mxfp4"


def mxfp4_blocks(nibbles: Array, scales: Array) -> Array:
    """Convert Hugging Face's MXFP4 to ggml's blocks, as flat bytes.

    Hugging Face stores weights 0 and 1 in the first byte, 2 and 3 in the second, and so on. A block of ggml is the scale, then 16
    bytes with weights 0 to 15 in their low halves and 16 to 31 in their high halves.

    Raises: ValueError if a scale is NaN.
    """
    packed = np.ascontiguousarray(nibbles).reshape(-1, 16)
    exponents = np.ascontiguousarray(scales).reshape(-1, 1)
    if (exponents == 0xFF).any():  # NaN as an 8-bit exponent
        raise ValueError("a scale is no number")
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 32)
    return np.concatenate([exponents, codes[:, :16] | codes[:, 16:] << 4], axis=1).reshape(-1)


def view_of(array: Array, transform: str) -> Array:
    """Return a view whose elements, in row-major order, are the transformed tensor. The view may have more axes than the tensor.

    Raises: ModelFileError for an unknown step, or one that does not fit the array.
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
            raise ValueError(f"there is no step {name} with {len(given)} numbers")


def view_shape(shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    """Return the shape of `view_of` for an array of `shape`. Raises: ModelFileError as `view_of`."""
    return view_of(np.broadcast_to(np.uint8(0), shape), transform).shape


def chunks_of(shape: tuple[int, ...], itemsize: int, read: Callable[[int, int], Array], transform: str) -> Iterator[Array]:
    """Yield the transformed tensor's elements in row-major order, in flat chunks of about a megabyte.

    `read(start, stop)` returns rows of a source of `shape`. The source is read in blocks of rows that can be transformed
    independently: whole heads for `rope_interleave`, whole matrices for `transpose`. A transform that mixes all rows reads all
    rows at once.
    """
    rows = shape[0] if shape else 1
    unit = max(1, _independent_rows(shape, transform))
    most = TENSOR_CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize)
    step = max(unit, most // unit * unit)
    for start in range(0, max(1, rows), step):
        block = read(start, min(rows, start + step))
        head, bar, rest = transform.partition("|")
        if step < rows and head.startswith("rope_interleave"):
            head = f"rope_interleave:{len(block) // unit}"
        yield from flat_chunks(view_of(block, head + bar + rest))


def _independent_rows(shape: tuple[int, ...], transform: str) -> int:
    """Return the smallest block size, in rows, such that blocks can be transformed independently of one another."""
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
    """Yield a view's elements in row-major order, in flat chunks of at most a megabyte."""
    if view.nbytes <= TENSOR_CHUNK_BYTES or view.ndim == 0:
        yield np.ascontiguousarray(view).reshape(-1)
    elif view.nbytes // len(view) > TENSOR_CHUNK_BYTES:
        for part in view:
            yield from flat_chunks(part)
    else:
        rows = max(1, TENSOR_CHUNK_BYTES * len(view) // view.nbytes)
        for first in range(0, len(view), rows):
            yield np.ascontiguousarray(view[first : first + rows]).reshape(-1)
