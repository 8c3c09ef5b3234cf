"""Bare connections to an API server, to which anything may be sent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshd.api.http.server import Server

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connections(server: Server, count: int, sent: bytes = b"") -> AsyncIterator[list[Streams]]:
    """Open connections one after the other, and send the same on each."""
    opened: list[Streams] = []
    try:
        for _ in range(count):
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(sent)
            opened.append((reader, writer))
            await asyncio.sleep(0.01)
        yield opened
    finally:
        for _, writer in opened:
            writer.close()


async def status(stream: Streams, sent: bytes = HEALTH) -> int | None:
    """Send a request. Returns: the status of its answer; None if the server has closed the connection."""
    reader, writer = stream
    writer.write(sent)
    async with asyncio.timeout(10.0):
        try:
            line = await reader.readline()
            while (await reader.readline()).strip():
                pass
            await reader.read(len(b'{"status": "ok"}'))
        except ConnectionError:
            return None
    return int(line.split()[1]) if line else None


async def is_open(stream: Streams) -> bool:
    """Whether the server keeps a connection open on which it has nothing to send."""
    try:
        async with asyncio.timeout(0.05):
            return bool(await stream[0].read(1))
    except TimeoutError:
        return True
    except ConnectionError:
        return False
