"""The state folder: private files with atomic writes, a lock for one daemon at a time, an id that reveals a copied folder."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec
from filelock import lock_descriptor

from meshd.errors import StorageError

MACHINE_FILES = (
    Path("/etc/machine-id"),
    Path("/var/lib/dbus/machine-id"),
    Path("/sys/firmware/devicetree/base/serial-number"),
)
"""Files that identify an installation, or a board whose card was cloned. `place` hashes those that exist."""
_LOCK = "lock"
_TRIES, _TRY_S = 5, 0.02
"""For the lock of a daemon: `read_holder` of another process may have it for a moment."""
_READ_TRIES = 3
"""For `read_holder`: two readers at once would take each other for a daemon. With eight threads that read without a pause, 1017 of
5000 answers were wrong after one try, 5 after two, none after three."""
_OTHERS = 0o077


class StateFolder:
    """One peer's folder, mode 0700; its files have mode 0600."""

    def __init__(self, path: Path, machine_files: Iterable[Path] = MACHINE_FILES) -> None:
        self.path = path
        self._machine_files = tuple(machine_files)

    @classmethod
    def open(cls, path: Path, machine_files: Iterable[Path] = MACHINE_FILES) -> Self:
        """Make the folder if needed and set its mode to 0700. Raises: StorageError."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_mode & _OTHERS:
                path.chmod(0o700)
        except OSError as error:
            raise _unusable(path, error) from error
        return cls(path, machine_files)

    def read(self, name: str) -> bytes | None:
        """Read a file.

        Returns: its bytes; None if it does not exist.
        Raises: StorageError, also if other users may read the file.
        """
        path = self.path / name
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                if mode & _OTHERS:
                    raise StorageError(f"{path} can be read by others: its mode is {mode & 0o777:04o}", hint=f"chmod 600 {path}")
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error) from error

    def write(self, name: str, data: bytes) -> Path:
        """Replace a file atomically and sync it: after a crash it has its old or its new content. Raises: StorageError."""
        path = self.path / name
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._sync()
        except OSError as error:
            raise _unusable(path, error) from error
        return path

    def place(self) -> str:
        """Hash the machine's ids and the folder's inode, so that a copy of the folder gives another result."""
        digest = hashlib.sha256(b"meshd place")
        for path in self._machine_files:
            try:
                digest.update(b"\0" + path.read_bytes().strip(b"\0\n "))
            except OSError:
                continue
        digest.update(b"\0%d" % self.path.stat().st_ino)
        return digest.hexdigest()[:32]

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon that holds a state folder."""

    pid: int
    api: str = ""
    """Its HTTP address, once it listens."""


class StateLock:
    """Held while a daemon runs on a folder. It belongs to the open file: the kernel frees it when the process ends or is killed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def announce(self, api: str) -> None:
        """Tell other processes where this daemon's HTTP API is."""
        content = msgspec.json.encode(Holder(pid=os.getpid(), api=api))
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    def release(self) -> None:
        """Let another daemon have the folder. May be repeated."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_state(path: Path, api: str = "") -> StateLock:
    """Take the folder for this process. Raises: StorageError, naming the holder if there is one."""
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path / _LOCK, error) from error
    try:
        held = _take(descriptor, _TRIES)
    except OSError as error:
        os.close(descriptor)
        raise _unusable(path / _LOCK, error) from error
    if not held:
        os.close(descriptor)
        raise StorageError(f"{path} is in use {_by(read_holder(path))}", hint="stop it, or take another folder with --state DIR")
    lock = StateLock(descriptor)
    lock.announce(api)
    return lock


def _take(descriptor: int, tries: int) -> bool:
    for left in reversed(range(tries)):
        if lock_descriptor(descriptor, blocking=False):
            return True
        if left:
            time.sleep(_TRY_S)
    return False


def read_holder(path: Path) -> Holder | None:
    """Who holds the folder now; None if nobody does."""
    try:
        with open(path / _LOCK, "r+b") as file:
            if _take(file.fileno(), _READ_TRIES):
                return None
            return msgspec.json.decode(file.read(4096), type=Holder)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None


def _by(holder: Holder | None) -> str:
    if holder is None:
        return "by another process"
    return f"by process {holder.pid}" + (f" ({holder.api})" if holder.api else "")


def _unusable(path: Path, error: OSError) -> StorageError:
    hint = "free space, fix its permissions, or take another folder with --state DIR"
    return StorageError(f"{path} can't be used: {error.strerror or error}", hint=hint)
