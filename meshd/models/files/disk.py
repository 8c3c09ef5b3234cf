"""Functions on this device's disk: free space, hashes, locks, and renames that survive a crash."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from meshd.errors import StorageError

CHUNK_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MARGIN_BYTES = 16 << 20
"""Bytes that are left free for other programs."""


class FileStamp(NamedTuple):
    """A file's size, modification time and inode. If they are unchanged, its content is taken to be unchanged."""

    size_bytes: int
    mtime_ns: int
    inode: int


def stamp_of(path: Path) -> FileStamp | None:
    """Read a file's stamp. Returns: None if there is no such file, or if it is a folder or a device."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def origin_of(paths: Iterable[Path]) -> str:
    """Hash the paths and stamps of files. The hash changes when one of the files is modified."""
    stamps = [(str(path), stamp_of(path)) for path in paths]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:32]


def size_of(path: Path) -> int:
    """Return a file's size in bytes; 0 if there is no such file."""
    stamp = stamp_of(path)
    return stamp.size_bytes if stamp else 0


def remove_file(path: Path) -> int:
    """Remove a file if it exists. Returns: the number of bytes freed. Raises: OSError."""
    freed = size_of(path)
    path.unlink(missing_ok=True)
    return freed


def storage_error(path: Path, error: OSError) -> StorageError:
    """Make the error for a file that can't be written. Its hint fits the reason."""
    return StorageError(f"{path} can't be written: {error.strerror or error}", hint=_hint_for(error))


def unreadable(path: Path, error: OSError) -> StorageError:
    """Make the error for a file that can't be read."""
    hint = f"make {path} readable for this user" if error.errno in _FORBIDDEN else "check the path and the disk"
    return StorageError(f"{path} can't be read: {error.strerror or error}", hint=hint)


def _hint_for(error: OSError) -> str:
    if error.errno in _FULL:
        return "free some disk space and pull again: what was downloaded is kept"
    if error.errno in _FORBIDDEN:
        return "make its folder writable for this user, or set another one with --models-dir or --hf-cache"
    return "check the disk, and pull again: what was downloaded is kept"


def need_space(folder: Path, size_bytes: int) -> None:
    """Check that the folder's disk has `size_bytes` of free space, and a margin. Raises: StorageError."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _MARGIN_BYTES:
        raise StorageError(
            f"{folder} has too little room: {size_bytes:,} bytes are needed and {free:,} are free",
            hint=f"free {size_bytes + _MARGIN_BYTES - free:,} bytes there, or set another folder with --models-dir or --hf-cache",
        )


def sha256_of(path: Path, advance: Callable[[int], None]) -> str:
    """Hash a file; call `advance` with the size of each chunk. Raises: StorageError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Read exactly `length` bytes of a file from `offset`. Raises: StorageError, also if the file ends before that."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) != length:
        raise StorageError(f"{path} ends before byte {offset + length}", hint="another program has cut it: fetch the model again")
    return data


def replace_durably(finished: Path, final: Path) -> None:
    """Rename a finished file to `final`. After a crash, `final` is either the old file or the complete new one. Raises: OSError."""
    with finished.open("rb+") as file:
        os.fsync(file.fileno())
    finished.replace(final)
    if os.name == "posix":
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def try_lock(lock: FileLock) -> bool:
    """Try to acquire a lock without waiting. Returns: whether it was free. Raises: StorageError if the lock file can't be made."""
    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        raise storage_error(path, error) from error
    return True
