"""A model's file of which some parts are here, at the offsets that they have in the whole file.

    FOLDER/file.gguf   sparse: it takes as much disk as has arrived
    FOLDER/about       what the file is made of and how it is called; its presence says that there is a copy
    FOLDER/have        the parts that arrived and had the right sum, a line each
    FOLDER/lock        held by whoever fills it

A line is added to `have` only when the bytes that it speaks of are on the disk, so that neither kill -9 nor a power cut makes one
that lies; a torn one counts for nothing. The first line names the data file's inode: in a folder that was copied, the parts are
hashed again before they are trusted.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Self

import msgspec

from meshd.errors import ModelFileError, StorageError
from meshd.models.files.disk import FileStamp, remove_file, replace_durably, size_of, stamp_of, storage_error
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import Manifest, check, check_layout, sha256_within
from meshd.types import ModelId, Tensor

log = getLogger(__name__)

HEADER_INDEX = 0
_FILE, _ABOUT, _HAVE = "file.gguf", "about", "have"


class CopyInfo(msgspec.Struct, frozen=True):
    """Of a partial copy, as its folder tells."""

    id: ModelId
    name: str
    """What a client writes in `model`."""
    ref: str
    created: int
    manifest: Manifest


class PartialFile(GgufFile):
    """A partial copy's mapping. A tensor that has not arrived is an error, not zeros."""

    here: frozenset[str] = frozenset()

    def tensor(self, name: str) -> Tensor:
        """Raises: ModelFileError if it is not in the file, or not on this disk."""
        if name in self.tensors and name not in self.here:
            raise ModelFileError(f"tensor {name!r} of {self.name} is not on this disk")
        return super().tensor(name)


class PartialCopy:
    """One folder. It is filled by one at a time, who holds its lock; many may read."""

    def __init__(self, folder: Path, about: CopyInfo, have: set[int]) -> None:
        self.about = about
        self.have = have
        """Indices of the parts that are here and right."""
        self._folder = folder
        self._stamps: tuple[FileStamp | None, ...] = ()
        self._doubtful: frozenset[int] = frozenset()
        self._mended = True
        self._file: int | None = None
        self._pending: list[int] = []
        self._writing = threading.Lock()
        self._flushing = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What is in a folder; None if that is nothing, or nothing that can be used. Raises: StorageError."""
        stamps = _stamps(folder)
        try:
            about = msgspec.msgpack.decode((folder / _ABOUT).read_bytes(), type=CopyInfo)
            check(about.manifest)
            lines = (folder / _HAVE).read_bytes()
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, ModelFileError) as error:
            log.warning("the partial copy in %s is torn and counts for nothing: %s", folder, error)
            return None
        except OSError as error:
            raise StorageError(f"{folder} can't be read: {error.strerror or error}") from error
        copy = cls(folder, about, set())
        copy._stamps = stamps
        return copy if copy._believe(lines) else None

    @classmethod
    def create(cls, folder: Path, about: CopyInfo) -> Self:
        """Begin a copy in place of what is there; there is room for its header alone until `grow`. Raises: StorageError."""
        copy = cls(folder, about, set())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copy.discard()
            with copy.path.open("wb") as file:
                file.truncate(about.manifest.parts[HEADER_INDEX].length)
            copy._write_have()
            copy._write(_ABOUT, msgspec.msgpack.encode(about))
        except OSError as error:
            raise storage_error(folder, error) from error
        return copy

    @property
    def path(self) -> Path:
        """Of the sparse file."""
        return self._folder / _FILE

    def is_fresh(self) -> bool:
        """Whether the folder still tells what it did when it was loaded."""
        return self._stamps == _stamps(self._folder)

    @property
    def in_doubt(self) -> bool:
        """Whether `begin` must mend what the folder tells."""
        return not self._mended

    @property
    def whole(self) -> bool:
        return len(self.have) == len(self.about.manifest.parts)

    @property
    def bytes_here(self) -> int:
        return sum(self.about.manifest.parts[index].length for index in self.have)

    def covers(self, offset: int, end: int) -> bool:
        """Whether these bytes lie in parts that are here."""
        parts = self.about.manifest.parts
        index = bisect_right(parts, offset, key=lambda part: part.offset) - 1
        while 0 <= index < len(parts) and index in self.have:
            if end <= parts[index].end:
                return True
            index += 1
        return False

    def header(self) -> GgufFile:
        """The model without its weights. Raises: ModelFileError, StorageError."""
        if HEADER_INDEX not in self.have:
            raise ModelFileError(f"the header of {self.about.name} is not on this disk")
        length = self.about.manifest.parts[HEADER_INDEX].length
        return GgufFile.from_header(read_piece(self.path, 0, length), self.about.name)

    def open(self) -> PartialFile:
        """Map the file; the tensors that are here now can be had. Raises: ModelFileError."""
        file = PartialFile.open(self.path)
        file.here = frozenset(self.about.manifest.parts[index].name for index in self.have)
        return file

    # For whoever fills it: `begin`, then the others from any thread, then `close`

    def begin(self, advance: Callable[[int], None]) -> None:
        """Make ready for writing; what is in doubt is hashed. Raises: StorageError."""
        try:
            self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            if not self._mended:
                self.have = {index for index in self._doubtful if self.is_right(index, advance)} | self.have
                self._write_have()
                self._mended = True
        except OSError as error:
            raise storage_error(self.path, error) from error

    def grow(self) -> None:
        """Check the header, which has arrived, and make room for all parts. Raises: ModelFileError, StorageError."""
        if size_of(self.path) == self.about.manifest.size:
            return
        check_layout(self.about.manifest, self.header().tensors)
        try:
            os.truncate(self.path, self.about.manifest.size)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes where they belong; they count for nothing until `keep`. Raises: StorageError."""
        assert self._file is not None
        try:
            with self._writing:
                os.lseek(self._file, offset, os.SEEK_SET)
                while data:
                    data = data[os.write(self._file, data) :]
        except OSError as error:
            raise storage_error(self.path, error) from error

    def is_right(self, index: int, advance: Callable[[int], None]) -> bool:
        """Whether a part on the disk has the sum that it must have. Raises: StorageError."""
        part = self.about.manifest.parts[index]
        try:
            with self.path.open("rb", buffering=0) as file:
                return sha256_within(file.read, file.seek, part.offset, part.length, advance) == part.sha256
        except OSError as error:
            raise StorageError(f"{self.path} can't be read: {error.strerror or error}") from error

    def keep(self, indices: Iterable[int]) -> None:
        """These parts are right. They are remembered across a crash once `flush` has ended."""
        found = list(indices)
        self.have.update(found)
        self._pending += found

    def flush(self) -> None:
        """Raises: StorageError."""
        assert self._file is not None
        with self._flushing:
            kept, self._pending = self._pending, []
            if not kept:
                return
            try:
                os.fsync(self._file)
                with (self._folder / _HAVE).open("ab") as lines:
                    lines.write(b"".join(map(self._line, kept)))
                    lines.flush()
                    os.fsync(lines.fileno())
            except OSError as error:
                raise storage_error(self.path, error) from error

    def close(self) -> None:
        """No more is written. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def discard(self) -> int:
        """Remove the copy; the bytes of disk that were in use. Whoever has it mapped keeps it. Raises: OSError."""
        freed = self.bytes_here
        remove_file(self._folder / _ABOUT)
        remove_file(self._folder / _HAVE)
        with suppress(PermissionError):  # Windows: it is mapped; the next copy begins with it
            remove_file(self.path)
        return freed

    # Insides

    def _believe(self, lines: bytes) -> bool:
        """Take up what `have` says; False if there is no file that it could speak of."""
        stamp = stamp_of(self.path)
        if stamp is None:
            return False
        first, *rest = lines.split(b"\n")
        said = {index for line in rest if (index := self._index(line)) is not None}
        if stamp.size_bytes != self.about.manifest.size:
            said = set()  # it was stopped before `grow`
        same = first == str(stamp.inode).encode()
        if same:
            self.have = said
        else:
            self._doubtful = frozenset(said)
        self._mended = same and lines.endswith(b"\n")
        return True

    def _index(self, line: bytes) -> int | None:
        number = line.partition(b" ")[0]
        index = int(number) if len(number) < 8 and number.isdigit() else -1
        known = 0 <= index < len(self.about.manifest.parts)
        return index if known and self._line(index) == line + b"\n" else None

    def _line(self, index: int) -> bytes:
        return f"{index} {self.about.manifest.parts[index].sha256[:8].hex()}\n".encode()

    def _write_have(self) -> None:
        stamp = stamp_of(self.path)
        first = f"{stamp.inode if stamp else 0}\n".encode()
        self._write(_HAVE, first + b"".join(map(self._line, sorted(self.have))))

    def _write(self, name: str, content: bytes) -> None:
        written = self._folder / f"{name}.new"
        written.write_bytes(content)
        replace_durably(written, self._folder / name)


def _stamps(folder: Path) -> tuple[FileStamp | None, ...]:
    return tuple(stamp_of(folder / name) for name in (_ABOUT, _HAVE))


def read_piece(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a file, all of them. Raises: StorageError."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}") from error
    if len(data) != length:
        raise StorageError(f"{path} ends before byte {offset + length}")
    return data
