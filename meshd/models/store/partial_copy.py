"""A partial copy of a model: some parts of its file, at their offsets in the whole file.

    FOLDER/file.gguf   sparse: only the parts received so far take disk space
    FOLDER/about       the manifest and the model's names; without it there is no copy
    FOLDER/have        the log of the parts that are on the disk with the right hash: see `meshd.models.store.parts_log`
    FOLDER/lock        held by the process that fills the copy

A line is appended to `have` only after the bytes of its parts were flushed to the disk, so that the log is true even after kill -9
or a power cut. A torn line is ignored. The log names the data file's inode: in a folder that was copied, the parts are hashed again
before they are used.
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
from meshd.models.files.disk import FileStamp, read_range, remove_file, replace_durably, size_of, stamp_of, storage_error
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import Manifest, check, check_layout, sha256_within
from meshd.models.store.parts_log import decode_log, encode_lines, encode_log
from meshd.types import ModelId, Tensor

log = getLogger(__name__)

HEADER_INDEX = 0
_FILE, _ABOUT, _HAVE = "file.gguf", "about", "have"


class CopyInfo(msgspec.Struct, frozen=True):
    """The model that a partial copy belongs to, as stored in its folder."""

    id: ModelId
    name: str
    """The name that a client writes in `model`."""
    ref: str
    created: int
    manifest: Manifest


class PartialFile(GgufFile):
    """A mapped partial copy. Reading a tensor that has not arrived raises, instead of returning zeros."""

    here: frozenset[str] = frozenset()
    """Names of the tensors that are on this disk."""

    def tensor(self, name: str) -> Tensor:
        """Map a tensor. Raises: ModelFileError if it is not in the file, or not on this disk."""
        if name in self.tensors and name not in self.here:
            raise ModelFileError(f"tensor {name!r} of {self.name} is not on this disk")
        return super().tensor(name)


class PartialCopy:
    """A partial copy in one folder. Several processes may read it; only the holder of its lock may fill it.

    To fill it: call `begin`; then `write`, `is_right`, `keep` and `flush`, from any thread; then `close`. Call `grow` once, when
    the header is kept.
    """

    def __init__(self, folder: Path, about: CopyInfo, have: set[int]) -> None:
        self.about = about
        self.have = have
        """Indices of the parts that are on the disk with the right hash."""
        self._folder = folder
        self._stamps: tuple[FileStamp | None, ...] = ()
        self._unverified: frozenset[int] = frozenset()
        self._log_valid = True
        self._file: int | None = None
        self._pending: list[int] = []
        self._writing = threading.Lock()
        self._flushing = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Open the copy in a folder. Returns: None if there is none that can be used. Raises: StorageError."""
        stamps = _stamps(folder)
        try:
            about = msgspec.msgpack.decode((folder / _ABOUT).read_bytes(), type=CopyInfo)
            check(about.manifest)
            recorded = (folder / _HAVE).read_bytes()
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, ModelFileError) as error:
            log.warning("the partial copy in %s is damaged and is ignored: %s", folder, error)
            return None
        except OSError as error:
            raise StorageError(f"{folder} can't be read: {error.strerror or error}") from error
        copy = cls(folder, about, set())
        copy._stamps = stamps
        return copy if copy._restore(recorded) else None

    @classmethod
    def create(cls, folder: Path, about: CopyInfo) -> Self:
        """Start an empty copy and discard any old one in the folder. Until `grow`, it has room for the header only.

        Raises: StorageError.
        """
        copy = cls(folder, about, set())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copy.discard()
            with copy.path.open("wb") as file:
                file.truncate(about.manifest.parts[HEADER_INDEX].length)
            copy._write_log()
            copy._write(_ABOUT, msgspec.msgpack.encode(about))
        except OSError as error:
            raise storage_error(folder, error) from error
        return copy

    @property
    def path(self) -> Path:
        """The sparse file."""
        return self._folder / _FILE

    def is_fresh(self) -> bool:
        """Whether the folder's `about` and `have` are unchanged since `load`."""
        return self._stamps == _stamps(self._folder)

    @property
    def in_doubt(self) -> bool:
        """Whether `begin` must hash parts again or rewrite the log."""
        return not self._log_valid

    @property
    def whole(self) -> bool:
        return len(self.have) == len(self.about.manifest.parts)

    @property
    def bytes_here(self) -> int:
        return sum(self.about.manifest.parts[index].length for index in self.have)

    def covers(self, offset: int, end: int) -> bool:
        """Whether all bytes of `[offset, end)` belong to parts in `have`."""
        parts = self.about.manifest.parts
        index = bisect_right(parts, offset, key=lambda part: part.offset) - 1
        while 0 <= index < len(parts) and index in self.have:
            if end <= parts[index].end:
                return True
            index += 1
        return False

    def header(self) -> GgufFile:
        """Read the model's metadata and tensor table. Raises: ModelFileError, StorageError."""
        if HEADER_INDEX not in self.have:
            raise ModelFileError(f"the header of {self.about.name} is not on this disk")
        length = self.about.manifest.parts[HEADER_INDEX].length
        return GgufFile.from_header(read_range(self.path, 0, length), self.about.name)

    def open(self) -> PartialFile:
        """Map the file, to read the tensors that are in `have` now. Raises: ModelFileError."""
        file = PartialFile.open(self.path)
        file.here = frozenset(self.about.manifest.parts[index].name for index in self.have)
        return file

    def begin(self, advance: Callable[[int], None]) -> None:
        """Open the file for writing. If the copy is in doubt, hash the listed parts that are not verified, and rewrite the log.

        Raises: StorageError.
        """
        try:
            self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            if not self._log_valid:
                self.have = {index for index in self._unverified if self.is_right(index, advance)} | self.have
                self._write_log()
                self._log_valid = True
        except OSError as error:
            raise storage_error(self.path, error) from error

    def grow(self) -> None:
        """Check the header against the manifest and extend the file for all parts. Raises: ModelFileError, StorageError."""
        if size_of(self.path) == self.about.manifest.size:
            return
        check_layout(self.about.manifest, self.header().tensors)
        try:
            os.truncate(self.path, self.about.manifest.size)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at their offset in the file. They do not count until `keep`. Raises: StorageError."""
        assert self._file is not None
        try:
            with self._writing:
                os.lseek(self._file, offset, os.SEEK_SET)
                while data:
                    data = data[os.write(self._file, data) :]
        except OSError as error:
            raise storage_error(self.path, error) from error

    def is_right(self, index: int, advance: Callable[[int], None]) -> bool:
        """Hash a part on the disk and compare it with the manifest. Raises: StorageError."""
        part = self.about.manifest.parts[index]
        try:
            with self.path.open("rb", buffering=0) as file:
                return sha256_within(file.read, file.seek, part.offset, part.length, advance) == part.sha256
        except OSError as error:
            raise StorageError(f"{self.path} can't be read: {error.strerror or error}") from error

    def keep(self, indices: Iterable[int]) -> None:
        """Add parts whose hash is right to `have`. They survive a crash after the next `flush`."""
        verified = list(indices)
        self.have.update(verified)
        self._pending += verified

    def flush(self) -> None:
        """Write the kept parts and their log lines to the disk. Raises: StorageError."""
        assert self._file is not None
        with self._flushing:
            pending, self._pending = self._pending, []
            if not pending:
                return
            try:
                os.fsync(self._file)
                with (self._folder / _HAVE).open("ab") as log_file:
                    log_file.write(encode_lines(self.about.manifest, pending))
                    log_file.flush()
                    os.fsync(log_file.fileno())
            except OSError as error:
                raise storage_error(self.path, error) from error

    def close(self) -> None:
        """Close the file for writing. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def discard(self) -> int:
        """Remove the copy; existing mappings of it stay valid. Returns: the bytes freed. Raises: OSError."""
        freed = self.bytes_here
        remove_file(self._folder / _ABOUT)
        remove_file(self._folder / _HAVE)
        with suppress(PermissionError):  # Windows can't remove a mapped file; the next `create` truncates it
            remove_file(self.path)
        return freed

    def _restore(self, content: bytes) -> bool:
        """Apply the log to this copy. Returns: False if the data file is missing."""
        stamp = stamp_of(self.path)
        if stamp is None:
            return False
        recorded = decode_log(self.about.manifest, content)
        listed = set(recorded.indices)
        if stamp.size_bytes != self.about.manifest.size:
            listed = set()  # the process died before `grow`
        same_file = recorded.inode == str(stamp.inode).encode()
        if same_file:
            self.have = listed
        else:
            self._unverified = frozenset(listed)
        self._log_valid = same_file and recorded.complete
        return True

    def _write_log(self) -> None:
        stamp = stamp_of(self.path)
        self._write(_HAVE, encode_log(stamp.inode if stamp else 0, self.about.manifest, self.have))

    def _write(self, name: str, content: bytes) -> None:
        written = self._folder / f"{name}.new"
        written.write_bytes(content)
        replace_durably(written, self._folder / name)


def _stamps(folder: Path) -> tuple[FileStamp | None, ...]:
    return tuple(stamp_of(folder / name) for name in (_ABOUT, _HAVE))
