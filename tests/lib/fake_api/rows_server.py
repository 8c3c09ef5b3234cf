"""A real HTTP server with fixed answers in place of a daemon, on its own thread."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Api:
    """The routes of the server, which must be set before the first request, and the requests that it received."""

    routes: dict[tuple[str, str], Handler] = field(default_factory=dict)
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
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
        if request.can_read_body:
            self.bodies.append(await request.json())
        handler = self.routes.get((request.method, request.path))
        return await handler(request) if handler else web.json_response({"error": {"message": "no route"}}, status=404)


@contextmanager
def serve(api: Api) -> Iterator[None]:
    started: Future[str] = Future()
    stop: Future[Callable[[], None]] = Future()

    async def run() -> None:
        runner = web.ServerRunner(web.Server(api.dispatch), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.set_result(lambda: loop.call_soon_threadsafe(ended.set))
        started.set_result(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        api.url = started.result(5)
        yield
    finally:
        stop.result(5)()
        thread.join(5)
