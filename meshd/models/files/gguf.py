"""A GGUF file: its header is read, its weights are mapped."""

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import Header, MetadataValue, TensorInfo, broken, parse_header
from meshd.types import Tensor

__all__ = ["GgufFile", "MetadataValue", "TensorInfo"]


class GgufFile:
    """A model's metadata and, where its file is there, its tensors as views of the file's mapping.

    Only pages that are touched are read from disk, so a peer that holds some layers reads those alone. The mapping is read-only
    and lives until the file is closed and the last view of it is gone. The file must not be cut short meanwhile: files are
    replaced by renaming, never written in place.
    """

    def __init__(self, name: str, header: Header, data: memoryview, mapping: mmap.mmap | None) -> None:
        """`data` is the whole file with its `mapping`, or the header alone."""
        self.name = name
        self._header = header
        self._data = data
        self._mapping = mapping

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map a file and check all of its header. Raises: ModelFileError."""
        name = str(path)
        try:
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(f"{name} can't be opened: {error.strerror}", hint="is the path right?") from error
        except ValueError as error:
            raise broken(name, "the file", "it is empty") from error
        data = memoryview(mapping)
        return cls(name, parse_header(data, name=name, file_bytes=len(data)), data, mapping)

    @classmethod
    def from_header(cls, data: bytes, name: str = "the model's header") -> Self:
        """A model without its weights, from `header_bytes()` of another peer. Raises: ModelFileError."""
        return cls(name, parse_header(memoryview(data), name=name, file_bytes=None), memoryview(data), None)

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        return self._header.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's description, in the file's order; also where only the header is here."""
        return self._header.tensors

    def header_bytes(self) -> bytes:
        """The file up to its first weight: what `from_header` needs. Not after `close`."""
        return bytes(self._data[: self._header.data_start])

    def tensor(self, name: str) -> Tensor:
        """A weight where it lies, not copied. Raises: ModelFileError if it is not in the file, or the file is not here."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.name} has no tensor {name!r}")
        if self._mapping is None:
            raise ModelFileError(f"tensor {name!r} of {self.name} can't be read: its file is not open here")
        return Tensor(name, info.kind, info.shape, self._data[info.offset : info.offset + info.nbytes])

    def let_go_of_pages(self) -> None:
        """Have the system take back the memory of what was read; it is read anew when it is touched."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def close(self) -> None:
        """No tensor can be had after this; those that were are good until they are dropped. Idempotent."""
        if self._mapping is None:
            return
        mapping, self._mapping = self._mapping, None
        self._data.release()
        with contextlib.suppress(BufferError):  # views are still out there: the mapping goes with the last of them
            mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
