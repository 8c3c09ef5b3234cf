"""A stand-in for a model hub: a real HTTP server with Hugging Face's routes, whose repositories can misbehave."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from fake_api.thread_server import served

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = "org/tiny"


def digest_of(content: bytes) -> str:
    """The content id that the hub gives."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Hub:
    """Repositories by name, how each misbehaves, and what was asked for."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Status and headers of every response of a repository."""
    stalls: dict[str, int] = field(default_factory=dict)
    """Number of bytes of a file after which its response stops coming, with the connection open."""
    tears: dict[str, int] = field(default_factory=dict)
    """Number of bytes of a file after which the connection breaks, every time."""
    moved: dict[str, str] = field(default_factory=dict)
    """Addresses to which GETs of a repository's files are redirected."""
    ranges: bool = True
    commit: str = COMMIT
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, file and Range header of each request for a file."""
    sent_bytes: int = 0
    stalled: int = 0
    """Number of responses that stall now."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.repositories.setdefault(TINY, {})

    @files.setter
    def files(self, files: dict[str, bytes]) -> None:
        self.repositories[TINY] = files

    @property
    def served(self) -> list[str]:
        """The files that were downloaded, each once."""
        return list(dict.fromkeys(name for method, name, _ in self.asked if method == "GET"))

    async def tree(self, request: web.Request) -> web.Response:
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        if refused := self._refused(name):
            return refused
        entry = {"type": "file", "oid": COMMIT, "size": 1}
        return web.json_response([entry | {"path": path} for path in self.repositories[name]])

    async def file(self, request: web.Request) -> web.StreamResponse:
        name, path = f"{request.match_info['org']}/{request.match_info['name']}", request.match_info["file"]
        self.asked.append((request.method, path, request.headers.get("Range", "")))
        if refused := self._refused(name):
            return refused
        if path not in self.repositories[name]:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
        content = self.repositories[name][path]
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{digest_of(content)}"', "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(len(content))})
        if name in self.moved:
            raise web.HTTPFound(self.moved[name])
        return await self._send(request, content, headers, name)

    async def _send(self, request: web.Request, content: bytes, headers: dict[str, str], name: str) -> web.StreamResponse:
        start, stop = 0, len(content)
        if self.ranges and (asked := request.headers.get("Range", "")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1) if last else stop
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        response = web.StreamResponse(status=206 if "Content-Range" in headers else 200, headers=headers)
        response.content_length = stop - start
        await response.prepare(request)
        limit = min(self.stalls.get(name, stop), self.tears.get(name, stop))
        sent = content[start : min(stop, max(start, limit))]
        self.sent_bytes += len(sent)
        await response.write(sent)
        if start + len(sent) < stop:
            if name in self.stalls:
                self.stalled += 1
                try:
                    await asyncio.sleep(600)
                finally:
                    self.stalled -= 1
            assert request.transport is not None
            request.transport.close()
        return response

    def _refused(self, name: str) -> web.Response | None:
        if name in self.refusals:
            status, headers = self.refusals[name]
            return web.Response(status=status, headers=headers)
        if name not in self.repositories:
            return web.Response(status=401, headers={"X-Error-Code": "RepoNotFound"})
        return None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a thread of its own."""

    def make_runner() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{name}/tree/{revision}", hub.tree)
        app.router.add_route("*", "/{org}/{name}/resolve/{revision}/{file:.+}", hub.file)
        return web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)

    with served(make_runner) as hub.url:
        yield hub
