"""The partial copies on this device: one folder for each model that has only some of its tensors here."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from filelock import FileLock

from meshd.clock import Clock
from meshd.errors import StorageError, UnknownModel
from meshd.models.files.disk import need_space, storage_error, try_lock
from meshd.models.store.partial_copy import CopyInfo, PartialCopy
from meshd.types import ModelId

_LOCK_POLL_S = 0.2
_MODEL_ID = re.compile("[0-9a-f]{32}")


class Partials:
    """The folder of all partial copies. Several processes may use it."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock

    def list(self) -> list[PartialCopy]:
        """List the copies by name. Raises: StorageError."""
        copies = [copy for folder in self._root.glob("*/") if (copy := PartialCopy.load(folder))]
        return sorted(copies, key=lambda copy: (copy.about.name, copy.about.id))

    def get(self, model: ModelId) -> PartialCopy | None:
        """Find a model's copy. Returns: None if there is none. Raises: StorageError."""
        return PartialCopy.load(self._root / model) if _MODEL_ID.fullmatch(model) else None

    def begin(self, about: CopyInfo) -> PartialCopy:
        """Start an empty copy and discard any old one. Call it inside `filling`. Raises: StorageError."""
        self.need_space(about.manifest.parts[0].length)
        return PartialCopy.create(self._root / about.id, about)

    def need_space(self, size_bytes: int) -> None:
        """Check that the disk has `size_bytes` of free space. Raises: StorageError."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self._root, error) from error
        need_space(self._root, size_bytes)

    @asynccontextmanager
    async def filling(self, model: ModelId) -> AsyncIterator[None]:
        """Hold the lock of a model's copy, to change the copy. Waits for other processes. Raises: UnknownModel, StorageError."""
        if not _MODEL_ID.fullmatch(model):
            raise UnknownModel(f"{model[:64]!r} is no model id")
        lock = self._lock(model)
        while not try_lock(lock):
            await self._clock.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            lock.release()

    def drop(self, model: ModelId) -> None:
        """Remove a model's copy if there is one. Call it inside `filling`. Raises: StorageError."""
        if copy := self.get(model):
            _discard(copy)

    def remove(self, name: str) -> int:
        """Remove the copies with this name, reference or id, except those that are being filled.

        Returns: the bytes freed. Raises: StorageError.
        """
        freed = 0
        for copy in self.list():
            lock = self._lock(copy.about.id)
            if name in (copy.about.name, copy.about.ref, copy.about.id) and try_lock(lock):
                try:
                    freed += _discard(copy)
                finally:
                    lock.release()
        return freed

    def _lock(self, model: ModelId) -> FileLock:
        return FileLock(self._root / model / "lock")


def _discard(copy: PartialCopy) -> int:
    try:
        return copy.discard()
    except OSError as error:
        raise StorageError(f"{copy.path} can't be removed: {error.strerror or error}") from error
