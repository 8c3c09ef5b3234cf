"""The state folder: private files with atomic writes, a lock so that only one daemon uses it, and detection of copied folders."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import msgspec
from filelock import lock_descriptor

from meshd.errors import StorageError

MACHINE_FILES = (
    Path("/etc/machine-id"),
    Path("/var/lib/dbus/machine-id"),
    Path("/sys/firmware/devicetree/base/serial-number"),
)
"""Files for `location_id`: ids of the installation, and of the board, because a cloned SD card has the same installation id."""
_LOCK = "lock"
_TRIES, _RETRY_S = 5, 0.02
"""Number of times that a daemon tries to get the lock, and the pause between tries: another process may hold the lock for a moment
in `read_holder`."""
_EXCLUSIVE_S = 5.0
_READ_TRIES = 3
"""Number of times that `read_holder` tries to get the lock: two simultaneous readers would each take the other for a daemon. With
eight threads that read without a pause, 1017 of 5000 answers were wrong with one try, 5 with two tries, and none with three."""
_OTHERS = 0o077

FileSignature = tuple[int, int, int]
"""What changes whenever a file is replaced: its inode's number, its size, and when it was written, in nanoseconds."""


class Folder(Protocol):
    """Where an agent keeps a file: the state folder, or memory in the simulator."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> object: ...


class MemoryFolder:
    """A folder in memory."""

    def __init__(self, files: Iterable[tuple[str, bytes]] = ()) -> None:
        self.files = dict(files)

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)

    def write(self, name: str, data: bytes) -> None:
        self.files[name] = data


class StateFolder:
    """One peer's folder. Its mode is 0700; its files have mode 0600."""

    def __init__(self, path: Path, machine_files: Iterable[Path] = MACHINE_FILES) -> None:
        self.path = path
        self._machine_files = tuple(machine_files)

    @classmethod
    def open(cls, path: Path, machine_files: Iterable[Path] = MACHINE_FILES) -> Self:
        """Create the folder if needed and set its mode to 0700. Raises: StorageError."""
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
        """Replace a file atomically and sync it. After a crash it has either its old or its new content. Raises: StorageError."""
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

    def signature(self, name: str) -> FileSignature | None:
        """Return what changes with each change of a file; None if it does not exist. Raises: OSError."""
        try:
            status = os.stat(self.path / name)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Let one process at a time run the block that reads files and writes them again. The lock is the file `NAME.lock`.

        Raises: StorageError if another process holds it for `_EXCLUSIVE_S`.
        """
        path = self.path / f"{name}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                locked = _try_lock(descriptor, round(_EXCLUSIVE_S / _RETRY_S))
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            if not locked:
                raise StorageError(f"{path} is held by another command", hint="wait until it has ended, then try again")
            yield
        finally:
            os.close(descriptor)

    def location_id(self) -> str:
        """Hash the machine's ids and the folder's inode number. A copy of the folder has another hash, even on this machine."""
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
    """The daemon that uses a state folder."""

    pid: int
    api: str = ""
    """The HTTP address of its API, as `HOST:PORT`. Empty: the daemon does not listen yet."""
    models: str = ""
    """The folder of its models. The command line puts a model there that the daemon is to run."""
    key: str = ""
    """An API key for this user's commands, new at each start. Only the owner of the folder can read it."""

    def __repr__(self) -> str:
        return f"Holder(pid={self.pid}, api={self.api!r})"


class StateLock:
    """The lock that a daemon holds on its state folder. The kernel releases it when the process ends or is killed."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def announce(self, api: str, models: str = "", key: str = "") -> None:
        """Write this daemon's process id, API address, folder of models and local key into the lock file, for `read_holder`.

        Raises: StorageError.
        """
        content = msgspec.json.encode(Holder(pid=os.getpid(), api=api, models=models, key=key))
        try:
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))
        except OSError as error:
            raise _unusable(self._path, error) from error

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_state(path: Path, api: str = "") -> StateLock:
    """Lock the folder for this process. Raises: StorageError, which names the daemon that has the lock."""
    try:
        # Without O_NOFOLLOW, a link in place of the lock file would have its target overwritten.
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(path / _LOCK, error) from error
    try:
        locked = _try_lock(descriptor, _TRIES)
    except OSError as error:
        os.close(descriptor)
        raise _unusable(path / _LOCK, error) from error
    if not locked:
        os.close(descriptor)
        holder = _holder_text(read_holder(path))
        raise StorageError(f"{path} is in use {holder}", hint="stop it, or use another folder with --state DIR")
    lock = StateLock(path / _LOCK, descriptor)
    try:
        lock.announce(api)
    except StorageError:
        lock.release()
        raise
    return lock


def _try_lock(descriptor: int, tries: int) -> bool:
    for left in reversed(range(tries)):
        if lock_descriptor(descriptor, blocking=False):
            return True
        if left:
            time.sleep(_RETRY_S)
    return False


def read_holder(path: Path) -> Holder | None:
    """Read which daemon holds the folder's lock. Returns: None if no daemon holds it, or if the lock file can't be read."""
    try:
        with open(path / _LOCK, "r+b") as file:
            if _try_lock(file.fileno(), _READ_TRIES):
                return None
            return msgspec.json.decode(file.read(4096), type=Holder)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None


def _holder_text(holder: Holder | None) -> str:
    if holder is None:
        return "by another process"
    return f"by process {holder.pid}" + (f" ({holder.api})" if holder.api else "")


def _unusable(path: Path, error: OSError) -> StorageError:
    hint = "free space, fix its permissions, or use another folder with --state DIR"
    return StorageError(f"{path} can't be used: {error.strerror or error}", hint=hint)
