"""Reads safetensors files: checks the header, then reads the tensors with the `safetensors` library.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of length, a JSON object of name -> type, shape and offsets,
then the tensors, which cover the rest of the file without gaps. The header is checked before the library reads it, so that its
size, depth and number of items are limited and errors name the file and the tensor.
"""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Self

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy; without it the library can't read BF16 into numpy
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MAX_TENSORS
from meshd.models.files.json_files import parse_object, shown, string_map, whole_number
from meshd.models.importing.source_files import INDEX, weight_files

MAX_HEADER_BYTES = 32 << 20
_MAX_ITEMS = 12 * MAX_TENSORS
_MAX_DIMENSIONS = 8
_MAX_NAME = 512
_MAX_EXTENT = 1 << 60
_DAMAGED = "the file is damaged or not safetensors: fetch it again"

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
"""Type in the file -> numpy's type of the same size.

BF16 is read as uint16; 8-bit floats are not read, only their size is checked.
"""

_NOT_READ = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0"})
"""Types that the library can't return as numpy arrays, since numpy has no 8-bit floats."""
_REOPEN_BYTES = 256 << 20
"""The file is mapped again after this many bytes were read, which returns the memory of their pages to the system."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor's type, shape and place in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file, in bytes."""
    nbytes: int


class SafetensorsFile:
    """One file, mapped read-only by the library. The file must not be truncated while it is open."""

    def __init__(self, path: Path, tensors: Mapping[str, Extent]) -> None:
        self.name = str(path)
        self.tensors = tensors
        self._path = path
        self._library: Any = None  # a safe_open, which has no type annotations
        self._bytes_read = 0

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file and check its header. Raises: ModelFileError."""
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
                tensors = parse_header(mapping, str(path))
        except OSError as error:
            raise ModelFileError(f"{path} can't be opened: {error.strerror or error}") from error
        except ValueError as error:
            raise ModelFileError(f"{path} can't be used: it is empty") from error
        opened = cls(path, tensors)
        opened._mapped()
        return opened

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Read rows `[start, stop)` of a tensor's first axis. A scalar or an empty tensor is read whole.

        Returns: a copy; BF16 as uint16.
        Raises: ModelFileError for an 8-bit float, and for a file that was replaced after it was opened.
        """
        info = self.tensors[name]
        if info.dtype in _NOT_READ:
            raise ModelFileError(f"{self.name} can't be used: tensor {shown(name)} is {info.dtype}, which can't be read")
        library = self._mapped()
        try:
            # The library can't slice a tensor without axes or without elements.
            sliced = info.nbytes and info.shape
            array: npt.NDArray[Any] = library.get_slice(name)[start:stop] if sliced else library.get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(f"{self.name} can't be used: tensor {shown(name)} can't be read: {error}") from error
        if info.dtype == "BF16":
            array = array.view("<u2")
        shape = (len(range(*slice(start, stop).indices(info.shape[0]))), *info.shape[1:]) if info.shape else ()
        if array.dtype != np.dtype(DTYPES[info.dtype]) or array.shape != shape:
            raise ModelFileError(f"{self.name} can't be used: it changed while it was read", hint="try again")
        self._bytes_read += array.nbytes
        return array

    def close(self) -> None:
        """Unmap the file. Idempotent; a later read maps it again."""
        if self._library is not None:
            self._library.__exit__(None, None, None)
            self._library = None

    def _mapped(self) -> Any:
        if self._bytes_read >= _REOPEN_BYTES:
            self.close()
            self._bytes_read = 0
        if self._library is None:
            try:
                self._library = safe_open(self._path, "numpy")
            except (OSError, SafetensorError) as error:
                raise ModelFileError(f"{self.name} can't be used: {error}", hint=_DAMAGED) from error
        return self._library


def header_length(data: mmap.mmap | bytes, name: str) -> int:
    """Return where the header ends, from the first 8 bytes of a file. Raises: ModelFileError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        why = f"its header of {length:,} bytes is not within {MAX_HEADER_BYTES:,} bytes"
        raise ModelFileError(f"{name} can't be used: {why}", hint=_DAMAGED)
    return 8 + length


def parse_header(data: mmap.mmap | bytes, name: str, size: int | None = None) -> Mapping[str, Extent]:
    """Check the header of a file of `size` bytes, of which `data` has the first ones. `size` None: `data` is the whole file.

    Returns: every tensor, in file order.
    Raises: ModelFileError.
    """

    def fail(why: str) -> NoReturn:
        raise ModelFileError(f"{name} can't be used: {why}", hint=_DAMAGED)

    size = len(data) if size is None else size
    length = int.from_bytes(data[:8], "little")
    if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8, len(data) - 8):
        fail(f"its header of {length:,} bytes is not within its {size:,} bytes (and {MAX_HEADER_BYTES:,} at most)")
    header = parse_object(data[8 : 8 + length], name, most_items=_MAX_ITEMS)
    if "__metadata__" in header and string_map(header.pop("__metadata__")) is None:
        fail("its __metadata__ is not an object of strings")
    if len(header) > MAX_TENSORS:
        fail(f"its {len(header):,} tensors are more than the {MAX_TENSORS:,} allowed")
    start = 8 + length
    try:
        rows = sorted(((tensor, _extent(tensor, entry, start)) for tensor, entry in header.items()), key=_order)
        end, before = start, "its header"
        for tensor, info in rows:
            if info.offset != end:
                what = "overlaps" if info.offset < end else "leaves a gap after"
                raise _WrongTensor(tensor, f"it {what} {before}")
            end, before = info.offset + info.nbytes, f"tensor {shown(tensor)}"
            if end > size:
                raise _WrongTensor(tensor, f"it ends at byte {end:,} of a file of {size:,}")
    except _WrongTensor as wrong:
        fail(f"tensor {shown(wrong.tensor)}: {wrong.why}")
    if end != size:
        fail(f"{size - end:,} bytes after {before} belong to nothing")
    return MappingProxyType(dict(rows))


class _WrongTensor(Exception):
    """A tensor's entry in the header is invalid or does not match the file."""

    def __init__(self, tensor: str, why: str) -> None:
        super().__init__(why)
        self.tensor = tensor
        self.why = why


def _order(row: tuple[str, Extent]) -> tuple[int, int]:
    """Return the key for sorting by offset. Of tensors with the same offset, those without elements come first."""
    return row[1].offset, row[1].nbytes


def _extent(tensor: str, entry: Any, start: int) -> Extent:
    if len(tensor) > _MAX_NAME:
        raise _WrongTensor(tensor, f"its name is longer than {_MAX_NAME} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _WrongTensor(tensor, "its entry is not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _WrongTensor(tensor, f"its type {shown(dtype)} is unknown here")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or any(whole_number(n, _MAX_EXTENT) is None for n in shape):
        raise _WrongTensor(tensor, f"its shape is not a list of at most {_MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(whole_number(n, _MAX_EXTENT) is None for n in offsets):
        raise _WrongTensor(tensor, "its data_offsets are not two positions")
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise _WrongTensor(tensor, f"its extent of {offsets[1] - offsets[0]} bytes is not the {nbytes} of {dtype} {shape}")
    return Extent(dtype, tuple(shape), start + offsets[0], nbytes)


class SafetensorsFolder:
    """All weights of a Hugging Face folder, in one file or several."""

    def __init__(self, name: str, files: Mapping[str, SafetensorsFile]) -> None:
        """`files` maps each tensor's name to its file."""
        self.name = name
        self._files = files

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open all files of a folder. Raises: ModelFileError, also if a file or tensor that the index names is missing."""
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
                    raise ModelFileError(
                        f"{folder / shard} can't be used: it has no tensor {shown(tensor)}, but {INDEX} lists it there"
                    )
        except ModelFileError:
            for file in opened:
                file.close()
            raise
        return cls(str(folder), by_tensor)

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor, by name."""
        return {name: (file.tensors[name].dtype, file.tensors[name].shape) for name, file in self._files.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Read rows of a tensor, as `SafetensorsFile.read` does."""
        return self._files[name].read(name, start, stop)

    def close(self) -> None:
        """Close all files. Idempotent."""
        for file in set(self._files.values()):
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
