"""Runs an aiohttp server on a thread of its own, for tests whose own thread blocks while they use it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from aiohttp import web


@contextmanager
def served(make_runner: Callable[[], web.BaseRunner]) -> Iterator[str]:
    """Serve on a free port of loopback. `make_runner` is called on the server's thread. Yields: the base URL."""
    started: Future[str] = Future()
    stop: Future[Callable[[], None]] = Future()

    async def run() -> None:
        runner = make_runner()
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
        yield started.result(5)
    finally:
        stop.result(5)()
        thread.join(5)
