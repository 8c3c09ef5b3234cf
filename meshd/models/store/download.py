"""HTTP downloads that resume where they stopped. They use the system's certificate store and proxy settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from yarl import URL

from meshd.clock import Clock
from meshd.errors import DownloadError
from meshd.models.files.disk import CHUNK_BYTES, remove_file, size_of, storage_error
from meshd.models.store.progress import ProgressMeter, in_thread

MAX_ATTEMPTS = 64
MAX_ATTEMPTS_WITHOUT_PROGRESS = 4
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
_NETWORK_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class _RetryableFailure(Exception):
    """An attempt failed, but the next one may succeed."""


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open the HTTP session of one pull."""
    async with aiohttp.ClientSession(
        timeout=_TIMEOUT, trust_env=True, read_bufsize=CHUNK_BYTES, headers={"Accept-Encoding": "identity"}
    ) as session:
        yield session


async def read_small(session: aiohttp.ClientSession, url: str, *, accept: str, most_bytes: int, clock: Clock) -> bytes:
    """Fetch a document of content type `accept` and of at most `most_bytes` bytes, with retries. Raises: DownloadError."""
    why = ""
    for attempt in range(MAX_ATTEMPTS_WITHOUT_PROGRESS):
        if attempt:
            await clock.sleep(_pause(attempt))
        try:
            async with session.get(url, headers={"Accept": accept}) as response:
                _check_status(response)
                body = await _read_at_most(response, most_bytes)
                if response.content_type != accept:
                    raise _failed(url, f"it answers {response.content_type}, not {accept}")
                return body
        except (_RetryableFailure, *_NETWORK_ERRORS) as error:
            why = _reason(error)
    raise _failed(url, why)


async def download(
    session: aiohttp.ClientSession,
    url: str,
    path: Path,
    *,
    size_bytes: int | None,
    most_bytes: int,
    meter: ProgressMeter,
    clock: Clock,
) -> None:
    """Fetch a file to `path`, or only the rest if `path` has its first bytes already. The caller must check the hash.

    `size_bytes` None: unknown; then `most_bytes` is the limit. A broken transfer is resumed, after a pause if it brought no bytes,
    until MAX_ATTEMPTS attempts, or MAX_ATTEMPTS_WITHOUT_PROGRESS in a row without new bytes, have failed.

    Raises: DownloadError, StorageError. Cancel: the bytes received so far stay, and the next download resumes after them.
    """
    fruitless, why = 0, ""
    for _ in range(MAX_ATTEMPTS):
        have = size_of(path)
        if size_bytes is not None and have == size_bytes:
            return
        if fruitless:
            await clock.sleep(_pause(fruitless))
        try:
            await _attempt(session, url, path, have, size_bytes if size_bytes is not None else most_bytes, meter)
            if size_bytes is None or size_of(path) == size_bytes:
                return
            why = "it ended early"
        except (_RetryableFailure, *_NETWORK_ERRORS) as error:
            why = _reason(error)
        fruitless = 0 if size_of(path) > have else fruitless + 1
        if fruitless == MAX_ATTEMPTS_WITHOUT_PROGRESS:
            break
    raise _failed(url, why)


async def _attempt(session: aiohttp.ClientSession, url: str, path: Path, have: int, most_bytes: int, meter: ProgressMeter) -> None:
    async with session.get(url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        if have and response.status == 416:
            remove_file(path)
            raise _RetryableFailure("it has no such range")
        _check_status(response)
        resumed = response.status == 206
        if resumed and response.headers.get("Content-Range", "").partition("-")[0] != f"bytes {have}":
            remove_file(path)
            raise _RetryableFailure("it sent another range than the one requested")
        start = have if resumed else 0
        meter.restart(start)
        await _save(response, path, start, most_bytes, meter)


async def _save(response: aiohttp.ClientResponse, path: Path, start: int, most_bytes: int, meter: ProgressMeter) -> None:
    try:
        with path.open("ab" if start else "wb") as file:
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                start += len(chunk)
                if start > most_bytes:
                    raise _failed(str(response.url), f"it sends more than the {most_bytes:,} bytes announced")
                await in_thread(meter, file.write, chunk)
                meter.advance(len(chunk))
    except _NETWORK_ERRORS:
        raise
    except OSError as error:
        raise storage_error(path, error) from error


async def _read_at_most(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > most_bytes:
            raise _failed(str(response.url), f"it sends more than {most_bytes:,} bytes")
    return bytes(body)


def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status in _RETRIED:
        raise _RetryableFailure(f"HTTP status {response.status}")
    if response.status not in (200, 206):
        raise _failed(str(response.url), f"HTTP status {response.status}")


def _pause(attempt: int) -> float:
    return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * float(1 << (attempt - 1)))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _failed(url: str, why: str) -> DownloadError:
    return DownloadError(f"{URL(url).with_user(None)} can't be read: {why}", hint="is the network up, and the address right?")
