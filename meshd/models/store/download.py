"""HTTP downloads that resume where they stopped. They use the system's certificate store and proxy settings."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import aiohttp
from yarl import URL

from meshd.clock import Clock
from meshd.errors import DownloadError
from meshd.models.files.disk import CHUNK_BYTES, remove_file, size_of, storage_error
from meshd.models.store.progress import ProgressMeter, in_thread

MAX_ATTEMPTS = 64
MAX_ATTEMPTS_WITHOUT_PROGRESS = 4
LONGEST_WAIT_S = 30.0
"""Longest pause that a server may ask for with Retry-After. If it asks for more, the download fails with an error."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
_NETWORK_ERRORS = (aiohttp.ClientError, TimeoutError, ConnectionError)
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_T = TypeVar("_T")


class _RetryableFailure(Exception):
    """An attempt failed, but the next one may succeed."""

    def __init__(self, why: str, wait_s: float = 0.0, *, busy: bool = False) -> None:
        """`wait_s`: how long the server asks to wait. `busy`: it answers that it can't serve now."""
        super().__init__(why)
        self.wait_s = wait_s
        self.busy = busy


class SourceUnreachable(DownloadError):
    """There is no network, or the server is busy: the same request may succeed later."""


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open the HTTP session of one pull."""
    async with aiohttp.ClientSession(
        timeout=_TIMEOUT, trust_env=True, read_bufsize=CHUNK_BYTES, headers={"Accept-Encoding": "identity"}
    ) as session:
        yield session


async def retried(attempt: Callable[[], Awaitable[_T]], url: str, clock: Clock) -> _T:
    """Run an attempt to read `url`, and repeat it after a pause if it fails in a way that may pass.

    Raises: DownloadError, which names the host and what to do.
    """
    failure: Exception = _RetryableFailure("it was not tried")
    for number in range(MAX_ATTEMPTS_WITHOUT_PROGRESS):
        if number:
            await clock.sleep(_pause(number, failure))
        try:
            return await attempt()
        except (_RetryableFailure, *_NETWORK_ERRORS) as error:
            failure = error
            if _asks_too_much(error):
                break
    raise _given_up(url, failure) from failure


async def read_small(session: aiohttp.ClientSession, url: str, *, accept: str, most_bytes: int, clock: Clock) -> bytes:
    """Fetch a document of content type `accept` and of at most `most_bytes` bytes, with retries. Raises: DownloadError."""

    async def attempt() -> bytes:
        async with session.get(url, headers={"Accept": accept}) as response:
            check_status(response)
            body = await read_limited(response, most_bytes)
            if response.content_type != accept:
                raise _failed(url, f"it answers {response.content_type}, not {accept}", _ADDRESS)
            return body

    return await retried(attempt, url, clock)


async def read_start(session: aiohttp.ClientSession, url: str, count: int, *, headers: Mapping[str, str], clock: Clock) -> bytes:
    """Fetch the first `count` bytes of a file, or all if it is shorter. Raises: DownloadError."""

    async def attempt() -> bytes:
        data = bytearray()
        async with session.get(url, headers={**headers, "Range": f"bytes=0-{count - 1}"}) as response:
            check_status(response)
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                data += chunk
                if len(data) >= count:  # a server without ranges sends the whole file
                    response.close()
                    break
        return bytes(data[:count])

    return await retried(attempt, url, clock)


async def download(
    session: aiohttp.ClientSession,
    url: str,
    path: Path,
    *,
    size_bytes: int | None,
    most_bytes: int,
    meter: ProgressMeter,
    clock: Clock,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Fetch a file to `path`, or only the rest if `path` has its first bytes already. The caller must check the hash.

    `size_bytes` None: unknown; then `most_bytes` is the limit. A broken transfer is resumed, after a pause if it brought no bytes,
    until MAX_ATTEMPTS attempts, or MAX_ATTEMPTS_WITHOUT_PROGRESS in a row without new bytes, have failed.

    Raises: DownloadError, StorageError. Cancel: the bytes received so far stay, and the next download resumes after them.
    """
    fruitless, failure = 0, Exception()
    for _ in range(MAX_ATTEMPTS):
        have = size_of(path)
        if size_bytes is not None and have == size_bytes:
            return
        if fruitless:
            await clock.sleep(_pause(fruitless, failure))
        try:
            limit = size_bytes if size_bytes is not None else most_bytes
            await _attempt(session, url, path, have, limit, meter, headers or {})
            if size_bytes is None or size_of(path) == size_bytes:
                return
            failure = _RetryableFailure(f"it ended early, after {size_of(path):,} of {size_bytes:,} bytes")
        except (_RetryableFailure, *_NETWORK_ERRORS) as error:
            failure = error
        fruitless = 0 if size_of(path) > have else fruitless + 1
        if fruitless == MAX_ATTEMPTS_WITHOUT_PROGRESS or _asks_too_much(failure):
            break
    raise _given_up(url, failure) from failure


async def _attempt(
    session: aiohttp.ClientSession,
    url: str,
    path: Path,
    have: int,
    most_bytes: int,
    meter: ProgressMeter,
    headers: Mapping[str, str],
) -> None:
    async with session.get(url, headers={**headers, **({"Range": f"bytes={have}-"} if have else {})}) as response:
        if have and response.status == 416:
            remove_file(path)
            raise _RetryableFailure("it has no such range")
        check_status(response)
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
            async for chunk in response.content.iter_any():
                start += len(chunk)
                if start > most_bytes:
                    why = f"it sends more than the {most_bytes:,} bytes announced"
                    raise _failed(str(response.url), why, "the file was changed or replaced: pull it again")
                await in_thread(meter, file.write, chunk)
                meter.advance(len(chunk))
    except _NETWORK_ERRORS:
        raise
    except OSError as error:
        raise storage_error(path, error) from error


async def read_limited(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """Read a response's body. Raises: DownloadError if it has more than `most_bytes` bytes."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > most_bytes:
            raise _failed(str(response.url), f"it sends more than {most_bytes:,} bytes", _ADDRESS)
    return bytes(body)


def check_status(response: aiohttp.ClientResponse) -> None:
    """Check that a response has content. Raises: DownloadError; for a status that may pass, what `retried` repeats."""
    status = response.status
    if status in _RETRIED:
        raise _RetryableFailure(f"HTTP status {status}", _seconds(response.headers.get("Retry-After")), busy=True)
    if status == 404:
        raise _failed(str(response.url), "there is no such page or file (HTTP status 404)", "check the name and the version")
    if status not in (200, 206):
        raise _failed(str(response.url), f"HTTP status {status}", _ADDRESS)


_ADDRESS = "check the address: HF_ENDPOINT sets that of the model hub, --pypi-index that of the package index"
_NETWORK = "check this device's network connection and proxy, then try again: what has come is kept"
_LATER = "try again later: what has come is kept"


def _seconds(text: str | None) -> float:
    """Parse a Retry-After header in seconds; 0 if it is absent or a date."""
    return float(text) if text and text.isdecimal() and len(text) < 10 else 0.0


def _asks_too_much(failure: Exception) -> bool:
    return isinstance(failure, _RetryableFailure) and failure.wait_s > LONGEST_WAIT_S


def _pause(attempt: int, failure: Exception) -> float:
    pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * float(1 << (attempt - 1)))
    return max(pause, failure.wait_s) if isinstance(failure, _RetryableFailure) else pause


def _given_up(url: str, failure: Exception) -> SourceUnreachable:
    """Make the error for a URL whose last attempt failed."""
    if isinstance(failure, _RetryableFailure):
        if failure.busy:
            host, wait_s = _host(url), failure.wait_s
            wait = f", and asks to wait {wait_s:,.0f} s" if wait_s else ""
            return SourceUnreachable(f"{_shown(url)} can't be read: {host} is busy ({failure}{wait})", hint=_LATER)
        return SourceUnreachable(f"{_shown(url)} can't be read: {failure}", hint=_NETWORK)
    return SourceUnreachable(f"{_shown(url)} can't be read: {unreachable(url, failure)}", hint=_NETWORK)


def unreachable(url: str, error: Exception) -> str:
    """Describe a failure of the network in words that name the host."""
    host = f"{error.host}:{error.port}" if isinstance(error, aiohttp.ClientConnectorError) else _host(url)
    match error:
        case aiohttp.ClientConnectorDNSError():
            return f"the name of {error.host} is not known: there is no network, or the name is wrong"
        case aiohttp.ClientSSLError():
            return f"{host} shows a certificate that is not trusted here ({error})"
        case aiohttp.ClientConnectorError(os_error=cause):
            return f"{host} can't be reached ({cause.strerror or cause})"
        case TimeoutError():
            return f"{host} does not answer in time"
        case _:
            return f"the connection to {host} broke ({str(error) or type(error).__name__})"


def _host(url: str) -> str:
    parsed = URL(url)
    return parsed.authority.rpartition("@")[2] or url


def _shown(url: str) -> str:
    return str(URL(url).with_user(None))


def _failed(url: str, why: str, hint: str) -> DownloadError:
    return DownloadError(f"{_shown(url)} can't be read: {why}", hint=hint)
