"""Safetensors files: their header is read and checked, their weights are mapped.

Source: https://github.com/huggingface/safetensors#format. Eight bytes of length, a JSON object of name -> type, shape and extent,
then the tensors, which cover the rest of the file without a gap. Every extent is checked before a byte of it is touched.
"""

import contextlib
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MAX_TENSORS
from meshd.models.files.json_files import parse_object, shown, texts, whole_number
from meshd.models.importing.source_files import INDEX, weight_files

MAX_HEADER_BYTES = 32 << 20
_MAX_ITEMS = 12 * MAX_TENSORS
_MAX_DIMENSIONS = 8
_MAX_NAME = 512
_MAX_EXTENT = 1 << 60

DTYPES: Mapping[str, npt.DTypeLike] = MappingProxyType(
    {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
        "BOOL": "?",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
    }
)
"""As numpy sees them; it knows neither BF16 nor 8-bit floats, whose bits are given."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor lies and how."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file, in bytes."""
    nbytes: int


class SafetensorsFile:
    """One file, mapped read-only. Views stay good until they are dropped; the file must not be cut short meanwhile."""

    def __init__(self, name: str, tensors: Mapping[str, Extent], mapping: mmap.mmap) -> None:
        self.name = name
        self.tensors = tensors
        self._mapping = mapping

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises: ModelFileError."""
        name = str(path)
        try:
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(f"{name} can't be opened: {error.strerror or error}") from error
        except ValueError as error:
            raise ModelFileError(f"{name} can't be used: it is empty") from error
        try:
            return cls(name, parse_header(mapping, name), mapping)
        except ModelFileError:
            mapping.close()
            raise

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor where it lies, read-only and not copied; BF16 as uint16."""
        info = self.tensors[name]
        flat = np.frombuffer(self._mapping, DTYPES[info.dtype], math.prod(info.shape), info.offset)
        return flat.reshape(info.shape)

    def drop(self, name: str) -> None:
        """A tensor has been read: its pages need not stay in memory. It can be read again."""
        info = self.tensors[name]
        if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Idempotent."""
        with contextlib.suppress(BufferError):  # views are still out there: the mapping goes with the last of them
            self._mapping.close()


def parse_header(data: mmap.mmap | bytes, name: str) -> Mapping[str, Extent]:
    """Every tensor of a whole file, in the order of their extents. Raises: ModelFileError."""

    def fail(why: str) -> NoReturn:
        raise ModelFileError(f"{name} can't be used: {why}", hint="the file is damaged or no safetensors: fetch it again")

    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        fail(f"its header of {length:,} bytes is not within its {size:,} bytes (and {MAX_HEADER_BYTES:,} at most)")
    header = parse_object(data[8 : 8 + length], name, most_items=_MAX_ITEMS)
    if "__metadata__" in header and texts(header.pop("__metadata__")) is None:
        fail("its __metadata__ is no object of strings")
    if len(header) > MAX_TENSORS:
        fail(f"its {len(header):,} tensors are more than the {MAX_TENSORS:,} allowed")
    start = 8 + length
    try:
        rows = sorted(((tensor, _extent(tensor, entry, start)) for tensor, entry in header.items()), key=_order)
        end, before = start, "its header"
        for tensor, info in rows:
            if info.offset != end:
                what = "overlaps" if info.offset < end else "leaves a gap after"
                raise _Wrong(tensor, f"it {what} {before}")
            end, before = info.offset + info.nbytes, f"tensor {shown(tensor)}"
            if end > size:
                raise _Wrong(tensor, f"it ends at byte {end:,} of a file of {size:,}")
    except _Wrong as wrong:
        fail(f"tensor {shown(wrong.tensor)}: {wrong.why}")
    if end != size:
        fail(f"{size - end:,} bytes after {before} belong to nothing")
    return MappingProxyType(dict(rows))


class _Wrong(Exception):
    """A tensor's entry can't be true."""

    def __init__(self, tensor: str, why: str) -> None:
        super().__init__(why)
        self.tensor = tensor
        self.why = why


def _order(row: tuple[str, Extent]) -> tuple[int, int]:
    """Tensors without elements come before the one that begins where they do."""
    return row[1].offset, row[1].nbytes


def _extent(tensor: str, entry: Any, start: int) -> Extent:
    if len(tensor) > _MAX_NAME:
        raise _Wrong(tensor, f"its name is longer than {_MAX_NAME} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Wrong(tensor, "it is not told by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Wrong(tensor, f"its type {shown(dtype)} is unknown here")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or any(whole_number(n, _MAX_EXTENT) is None for n in shape):
        raise _Wrong(tensor, f"its shape is no list of at most {_MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(whole_number(n, _MAX_EXTENT) is None for n in offsets):
        raise _Wrong(tensor, "its data_offsets are no two positions")
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _Wrong(tensor, f"its extent of {offsets[1] - offsets[0]} bytes is not the {nbytes} of {dtype} {shape}")
    return Extent(dtype, tuple(shape), start + offsets[0], nbytes)


class SafetensorsFolder:
    """All weights of a Hugging Face folder, whether they lie in one file or in several."""

    def __init__(self, name: str, files: Mapping[str, SafetensorsFile]) -> None:
        """`files`: by tensor."""
        self.name = name
        self._files = files

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises: ModelFileError, also for a file or a tensor that the index names and that is not there."""
        paths, promised = weight_files(folder)
        opened: list[SafetensorsFile] = []
        by_tensor: dict[str, SafetensorsFile] = {}
        try:
            for path in paths:
                opened.append(SafetensorsFile.open(path))
                for tensor in opened[-1].tensors:
                    if tensor in by_tensor:
                        raise ModelFileError(f"{path} can't be used: tensor {shown(tensor)} is in {by_tensor[tensor].name} too")
                    by_tensor[tensor] = opened[-1]
            for tensor, shard in promised.items():
                if tensor not in by_tensor or by_tensor[tensor].name != str(folder / shard):
                    raise ModelFileError(f"{folder / shard} can't be used: it has no tensor {shown(tensor)}, which {INDEX} says")
        except ModelFileError:
            for file in opened:
                file.close()
            raise
        return cls(str(folder), by_tensor)

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (type, shape)."""
        return {name: (file.tensors[name].dtype, file.tensors[name].shape) for name, file in self._files.items()}

    def array(self, name: str) -> npt.NDArray[Any]:
        """See `SafetensorsFile.array`."""
        return self._files[name].array(name)

    def drop(self, name: str) -> None:
        """See `SafetensorsFile.drop`."""
        self._files[name].drop(name)

    def close(self) -> None:
        """Idempotent."""
        for file in set(self._files.values()):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
