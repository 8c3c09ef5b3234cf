"""Fetch models from a hub into the standard cache, reading their headers first."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from meshd.clock import Clock
from meshd.errors import DownloadError, ModelFileError
from meshd.models.files.disk import need_space, remove_file, sha256_of, size_of, storage_error
from meshd.models.files.gguf import GgufFile
from meshd.models.files.gguf_header import MAX_HEADER_BYTES, HeaderIncomplete, parse_header
from meshd.models.files.safetensors_file import header_length
from meshd.models.files.safetensors_file import parse_header as parse_safetensors
from meshd.models.importing.import_model import folder_writer, parts_writer
from meshd.models.importing.plan import Array
from meshd.models.importing.text_metadata import MAX_TOKENIZER_BYTES
from meshd.models.store.catalogue import HubSource
from meshd.models.store.download import SourceUnreachable, download, http_session, read_start
from meshd.models.store.hub.cache import HubCache, RemoteFile
from meshd.models.store.hub.choose import all_parts, choose_files
from meshd.models.store.hub.client import HubClient
from meshd.models.store.progress import ProgressMeter, PullPhase, in_thread

CheckHeader = Callable[[GgufFile], Awaitable[None]]
"""Raises ModelFileError for the header of a model that could not answer."""
_FIRST_BYTES = 1 << 20
_GROWTH = 4
_WEIGHTS = (".gguf", ".safetensors")
_MOST_BYTES = 1 << 44
_SHA256_LENGTH = 64


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub, of which the header is known."""

    header: GgufFile
    """That of the GGUF file, or of the file that an import would write."""
    fetch_bytes: int
    """Size of the files that are not in the cache."""
    sha256: str | None
    """Hash of the GGUF file, if the model is one and the hub gives it."""


async def fetch_from_hub(
    source: HubSource,
    folder: Path,
    *,
    cache: Path | None,
    endpoint: str | None,
    meter: ProgressMeter,
    clock: Clock,
    check: CheckHeader,
) -> Path:
    """Fetch a model into the cache, unless the cache has it. `check` gets its header before its weights are fetched.

    `cache` None: the standard cache. No other pull may use `folder` at the same time; it keeps the bytes of a stopped download.

    Returns: the path of the model in the cache: its file, the first part of a split file, or its folder of safetensors.
    Raises: DownloadError, StorageError, ModelFileError, and what `check` raises.
    Cancel: the bytes received so far stay, and the next call fetches only the rest.
    """
    meter.begin(PullPhase.FINDING, source=source)
    async with http_session() as session:
        pull = _HubPull(source, session, HubCache(cache, source.repository), folder, endpoint, meter, clock)
        paths = pull.from_cache_alone()
        if not paths:
            try:
                files = await pull.locate()
            except SourceUnreachable:
                paths = pull.from_cache_alone(offline=True)
                if not paths:
                    raise
            else:
                await pull.fetch_small(files)
                await check(await pull.header(files))
                paths = await pull.fetch(files)
    return paths[0] if paths[0].name.endswith(".gguf") else paths[0].parent


async def look_at_hub(
    source: HubSource, folder: Path, *, cache: Path | None, endpoint: str | None, meter: ProgressMeter, clock: Clock
) -> HubModel:
    """Read a model's header, and fetch nothing else but its configuration and tokenizer.

    Raises: DownloadError, StorageError, ModelFileError.
    """
    async with http_session() as session:
        pull = _HubPull(source, session, HubCache(cache, source.repository), folder, endpoint, meter, clock)
        files = await pull.locate()
        await pull.fetch_small(files)
        header = await pull.header(files)
        missing = sum(file.size or 0 for file in files if pull.cache.find(file) is None)
        alone = files[0] if len(files) == 1 and len(files[0].etag) == _SHA256_LENGTH and not source.quant else None
        return HubModel(header, missing, alone.etag if alone else None)


class _HubPull:
    """One pull of a model."""

    def __init__(
        self,
        source: HubSource,
        session: aiohttp.ClientSession,
        cache: HubCache,
        folder: Path,
        endpoint: str | None,
        meter: ProgressMeter,
        clock: Clock,
    ) -> None:
        self.cache = cache
        self._hub = HubClient(session, endpoint, clock)
        self._source, self._session, self._folder, self._meter, self._clock = source, session, folder, meter, clock

    def from_cache_alone(self, *, offline: bool = False) -> list[Path]:
        """Return the model's files if the cache has them all at the named commit; with `offline`, at the last known commit.

        Returns: an empty list if it has not.
        """
        revision = self._source.revision
        if not offline and (revision is None or len(revision) != 40):
            return []
        try:
            names = (
                all_parts(self._source.file)
                if self._source.file
                else choose_files(self._source, self.cache.files_offline(revision))
            )
        except (DownloadError, ModelFileError):
            return []
        return self.cache.find_offline(revision, names)

    async def locate(self) -> list[RemoteFile]:
        """Find the model's files, all at one commit. Raises: DownloadError."""
        source = self._source
        names = all_parts(source.file) if source.file else choose_files(source, await self._hub.files(source))
        files = [await self._hub.locate(source, name) for name in names]
        if len({file.commit for file in files}) > 1:
            raise DownloadError(
                f"{source} was changed while it was looked at: its files are of several versions", hint="pull it again"
            )
        self.cache.remember(source.revision, files[0].commit)
        return files

    async def fetch_small(self, files: Sequence[RemoteFile]) -> None:
        """Fetch the configuration and the tokenizer of a model of safetensors."""
        for file in files:
            if not file.name.endswith(_WEIGHTS) and self.cache.find(file) is None:
                if (file.size or 0) > MAX_TOKENIZER_BYTES:
                    raise ModelFileError(f"{file.url} can't be used: it has {file.size:,} bytes", hint="take another repository")
                await self._download(file)

    async def header(self, files: Sequence[RemoteFile]) -> GgufFile:
        """Make the header of the model's GGUF file from the first bytes of its files. Raises: DownloadError, ModelFileError."""
        if not files[0].name.endswith(".gguf"):
            tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
            for file in files:
                if file.name.endswith(".safetensors"):
                    tensors |= await self._tensors(file)
            config, name = self.cache.find(files[0]), files[0].url.removesuffix("/config.json")
            assert config is not None
            writer = await in_thread(self._meter, folder_writer, config.parent, name, tensors, self._source.quant, _no_weights)
            return GgufFile.from_header(writer.header, str(self._source))
        headers = [await self._gguf_header(file) for file in files]
        if len(headers) == 1:
            return headers[0]
        return GgufFile.from_header(parts_writer(headers, str(self._source), self._source.quant).header, str(self._source))

    async def _gguf_header(self, file: RemoteFile) -> GgufFile:
        count = _FIRST_BYTES
        while True:
            data = await self._start_of(file, count)
            size = file.size or MAX_HEADER_BYTES
            try:
                header = await in_thread(self._meter, parse_header, memoryview(data), name=file.url, file_bytes=size)
            except HeaderIncomplete:
                count *= _GROWTH
            else:
                return GgufFile(file.url, header, memoryview(data), None)

    async def _tensors(self, file: RemoteFile) -> dict[str, tuple[str, tuple[int, ...]]]:
        data = await self._start_of(file, _FIRST_BYTES)
        whole = header_length(data, file.url)
        if whole > len(data):
            data = await self._start_of(file, whole)
        extents = await in_thread(self._meter, parse_safetensors, data, file.url, file.size)
        return {name: (extent.dtype, extent.shape) for name, extent in extents.items()}

    async def _start_of(self, file: RemoteFile, count: int) -> bytes:
        """Read the first `count` bytes of a file, from this disk as far as they are here. Those from the hub are kept."""
        count = min(count, file.size) if file.size else count
        partial = self._partial(file)
        for path in filter(None, (self.cache.find(file), partial)):
            if size_of(path) >= count:
                with path.open("rb") as opened:
                    return opened.read(count)
        data = await read_start(self._session, file.url, count, headers=self._hub.headers, clock=self._clock)
        if size_of(partial) < len(data):
            try:
                partial.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
            except OSError as error:
                raise storage_error(partial, error) from error
        return data

    async def fetch(self, files: Sequence[RemoteFile]) -> list[Path]:
        """Fetch the files that the cache lacks. Returns: the paths of all files. Raises: DownloadError, StorageError."""
        missing = [file for file in files if self.cache.find(file) is None]
        if missing:
            total = sum(file.size or 0 for file in missing)
            have = sum(size_of(self._partial(file)) for file in missing)
            self._folder.mkdir(parents=True, exist_ok=True)
            need_space(self._folder, max(0, total - have))
            self._meter.begin(PullPhase.DOWNLOADING, total=total or None)
            for file in missing:
                await self._download(file)
                self._meter.settle(file.size or 0)
        paths = [self.cache.find(file) for file in files]
        if any(path is None for path in paths):
            raise DownloadError(f"{self._source} was removed from {self.cache.root} while it was fetched", hint="pull it again")
        return [path for path in paths if path is not None]

    async def _download(self, file: RemoteFile) -> Path:
        partial = self._partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        await download(
            self._session,
            file.url,
            partial,
            size_bytes=file.size,
            most_bytes=file.size if file.size is not None else _MOST_BYTES,
            meter=self._meter,
            clock=self._clock,
            headers=self._hub.headers,
        )
        if len(file.etag) == _SHA256_LENGTH and not await self._is_right(file, partial):
            remove_file(partial)
            raise DownloadError(f"{file.url} is not what the hub lists: its sha256 differs", hint="pull it again: it starts over")
        return self.cache.add(file, partial)

    async def _is_right(self, file: RemoteFile, partial: Path) -> bool:
        return await in_thread(self._meter, sha256_of, partial, lambda _: self._meter.advance(0)) == file.etag

    def _partial(self, file: RemoteFile) -> Path:
        return self._folder / file.etag


def _no_weights(name: str, start: int, stop: int | None) -> Array:
    raise AssertionError("a header has no weights")
