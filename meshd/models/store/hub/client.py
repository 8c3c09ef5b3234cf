"""Asks a model hub which files a repository has and where they are, and explains what it refuses."""

from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
import msgspec
from yarl import URL

from meshd.clock import Clock
from meshd.errors import DownloadError
from meshd.models.store.catalogue import HubSource
from meshd.models.store.download import check_status, read_limited, retried
from meshd.models.store.hub.cache import DEFAULT_REVISION, RemoteFile, checked_file, is_safe_name

_MAX_LISTING_BYTES = 16 << 20
_MAX_PAGES = 50
_MAX_REDIRECTS = 5


class _Entry(msgspec.Struct, frozen=True):
    """An entry of a repository's tree."""

    path: str
    type: str = "file"


class HubClient:
    """The API of one hub. Used for one pull."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str | None, clock: Clock) -> None:
        """`endpoint` None: HF_ENDPOINT, else huggingface.co. The user's token goes to this address only."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.headers: dict[str, str] = build_hf_headers(library_name="meshd")
        self._session = session
        self._clock = clock

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc

    async def files(self, source: HubSource) -> list[str]:
        """List a repository's files. Raises: DownloadError."""
        revision = quote(source.revision or DEFAULT_REVISION, safe="")
        url = f"{self.endpoint}/api/models/{source.repository}/tree/{revision}?recursive=true"
        found: list[str] = []
        for _ in range(_MAX_PAGES):
            entries, following = await retried(partial(self._page, url, source), url, self._clock)
            found += [entry.path for entry in entries if entry.type == "file" and is_safe_name(entry.path)]
            if not following:
                return found
            url = following
        raise DownloadError(
            f"{source} can't be fetched: its repository has too many files", hint="name the file, as in hf:ORG/NAME:FILE"
        )

    async def _page(self, url: str, source: HubSource) -> tuple[list[_Entry], str]:
        async with self._session.get(URL(url, encoded=True), headers=self.headers) as response:
            self._check(response, source, None)
            body = await read_limited(response, _MAX_LISTING_BYTES)
            links = response.links
            following = str(links["next"]["url"]) if "next" in links else ""
        try:
            entries = msgspec.json.decode(body, type=list[_Entry])
        except msgspec.DecodeError as error:
            raise DownloadError(
                f"{self.host} answered with no list of files at {url}: {error}", hint="is HF_ENDPOINT the address of a model hub?"
            ) from error
        return entries, following if urlsplit(following).netloc == urlsplit(url).netloc else ""

    async def locate(self, source: HubSource, name: str) -> RemoteFile:
        """Find a file's commit, content id and size. Raises: DownloadError."""
        revision = quote(source.revision or DEFAULT_REVISION, safe="")
        url = f"{self.endpoint}/{source.repository}/resolve/{revision}/{quote(name)}"
        return await retried(partial(self._locate, url, source, name), url, self._clock)

    async def _locate(self, url: str, source: HubSource, name: str) -> RemoteFile:
        for _ in range(_MAX_REDIRECTS):
            async with self._session.head(URL(url, encoded=True), headers=self.headers, allow_redirects=False) as response:
                self._check(response, source, name)
                target = response.headers.get("Location", "")
                renamed = response.status in (301, 302, 303, 307, 308) and not urlsplit(target).netloc
                if not (renamed and target):  # a redirect to another host is that to the content
                    return self._described(response.headers, url, name)
                url = urljoin(url, target)
        raise DownloadError(f"{url} can't be fetched: it redirects without end", hint="is HF_ENDPOINT the address of a model hub?")

    def _described(self, headers: Any, url: str, name: str) -> RemoteFile:
        etag = headers.get("X-Linked-Etag") or headers.get("ETag", "")
        size = headers.get("X-Linked-Size") or headers.get("Content-Length", "")
        number = int(size) if str(size).isdecimal() else None
        return checked_file(name, url, headers.get("X-Repo-Commit", ""), etag.removeprefix("W/").strip('"'), number)

    def _check(self, response: aiohttp.ClientResponse, source: HubSource, name: str | None) -> None:
        """Raises: DownloadError for a refusal, with what to do about it; what `check_status` raises."""
        code, status = response.headers.get("X-Error-Code", ""), response.status
        repository, page = source.repository, f"{self.endpoint}/{source.repository}"
        if code == "GatedRepo" or (status == 403 and not code):
            sent = "authorization" in {header.lower() for header in self.headers}
            whose = "this token's account has not accepted them" if sent else "no token was sent"
            raise DownloadError(
                f"{source} can't be fetched: {repository} on {self.host} is gated by terms, and {whose}",
                hint=f"accept its terms at {page}, then set HF_TOKEN to a token of that account",
            )
        if code == "RevisionNotFound":
            hint = f"see {page}/tree/main for its branches and tags"
            raise DownloadError(f"{source} can't be fetched: {repository} has no revision {source.revision or 'main'}", hint=hint)
        if code == "EntryNotFound" or (status == 404 and not code and name is not None):
            raise DownloadError(
                f"{source} can't be fetched: {repository} has no file {name}", hint=f"see {page}/tree/main for its files"
            )
        if code == "RepoNotFound" or status in (401, 404):
            raise DownloadError(
                f"{source} can't be fetched: {self.host} has no repository {repository}, or it is private",
                hint="check the name; for a private one, set HF_TOKEN to a token that may read it",
            )
        if not 300 <= status < 400:
            check_status(response)
