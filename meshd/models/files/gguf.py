"""Opens GGUF files: parses the header and maps the weights."""

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
    """A model's metadata and, unless only its header is available, its tensors as views of the mapped file.

    Only pages that are accessed are read from disk, so a peer that holds some layers reads only those. The mapping is read-only and
    exists until the file is closed and the last view of it is freed. The file must not be truncated before that: to change a
    model's file, rename a new file over it.
    """

    def __init__(self, name: str, header: Header, data: memoryview, mapping: mmap.mmap | None) -> None:
        """`data` is the whole mapped file, or only its header if `mapping` is None."""
        self.name = name
        self._header = header
        self._data = data
        self._mapping = mapping

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map a file and check its header. Raises: ModelFileError."""
        name = str(path)
        try:
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(f"{name} can't be opened: {error.strerror}", hint="check the path") from error
        except ValueError as error:
            raise broken(name, "the file", "it is empty") from error
        data = memoryview(mapping)
        return cls(name, parse_header(data, name=name, file_bytes=len(data)), data, mapping)

    @classmethod
    def from_header(cls, data: bytes, name: str = "the model's header") -> Self:
        """Make a model without weights from the `header_bytes()` of another peer. Raises: ModelFileError."""
        return cls(name, parse_header(memoryview(data), name=name, file_bytes=None), memoryview(data), None)

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        return self._header.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Descriptions of all tensors by name, in the file's order; also available without the weights."""
        return self._header.tensors

    def header_bytes(self) -> bytes:
        """Copy the file up to its first weight, for `from_header`. Must not be called after `close`."""
        return bytes(self._data[: self._header.data_start])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view. Raises: ModelFileError if the file has no such tensor, or is closed or only a header."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.name} has no tensor {name!r}")
        if self._mapping is None:
            raise ModelFileError(f"tensor {name!r} of {self.name} can't be read: its file is not open here")
        return Tensor(name, info.kind, info.shape, self._data[info.offset : info.offset + info.nbytes])

    def release_pages(self) -> None:
        """Release the memory of the pages read so far. They are read again when they are accessed."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def close(self) -> None:
        """Close the file. Idempotent. Tensors returned before stay valid."""
        if self._mapping is None:
            return
        mapping, self._mapping = self._mapping, None
        self._data.release()
        with contextlib.suppress(BufferError):  # views still exist: the mapping is freed with the last view
            mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
