"""A real HTTP server with fixed answers in place of a daemon, on its own thread."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fake_api.thread_server import served

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Api:
    """The routes of the server, which must be set before the first request, and the requests that it received."""

    routes: dict[tuple[str, str], Handler] = field(default_factory=dict)
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each."""
    url: str = ""

    def answer(self, method: str, path: str, document: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer requests of this route with a JSON document."""

        async def handler(_: web.Request) -> web.Response:
            return web.json_response(document, status=status, headers=headers)

        self.routes[method, path] = handler

    def stream(self, path: str, chunks: list[bytes], headers: dict[str, str] | None = None) -> None:
        """Answer POST requests of this path with a stream of server-sent events, one write for each chunk."""

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **(headers or {})})
            await response.prepare(request)
            for chunk in chunks:
                await response.write(chunk)
            return response

        self.routes["POST", path] = handler

    async def dispatch(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.requests.append((request.method, request.path))
        if request.can_read_body:
            self.bodies.append(await request.json())
        handler = self.routes.get((request.method, request.path))
        return await handler(request) if handler else web.json_response({"error": {"message": "no route"}}, status=404)


@contextmanager
def serve(api: Api) -> Iterator[None]:
    with served(lambda: web.ServerRunner(web.Server(api.dispatch), shutdown_timeout=0.1)) as api.url:
        yield
