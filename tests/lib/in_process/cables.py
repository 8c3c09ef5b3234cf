"""A TCP relay between a peer and the address that it dials."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_ACCEPTING = 4
"""Iterations of the event loop within which asyncio has accepted a connection."""


class Cable:
    """Relays connections to a port. It can be cut like a cable (nothing passes, and neither end gets an error), or snap."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        """How long bytes take through the cable."""
        self.whole = asyncio.Event()
        self.whole.set()
        self.passed = 0
        """Bytes that have passed in both directions."""
        self._relays: set[asyncio.Task[None]] = set()
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        """The two ends of each connection: of the side that dialled, and of the side that accepted."""

    @asynccontextmanager
    async def to(self, port: int, *, host: str = "127.0.0.1", at: int = 0) -> AsyncIterator[int]:
        """Relay connections to a port of 127.0.0.1, which sees them come from `host`. `at`: the port to listen on; 0: any free one.

        Yields: the port to dial, at the address `host`.
        """

        def plugged(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            relay = asyncio.create_task(self._relay(host, port, reader, writer))
            # A relay that is cancelled before it has begun closes nothing itself.
            relay.add_done_callback(lambda _: writer.transport.abort())
            self._relays.add(relay)

        server = await asyncio.start_server(plugged, host, at)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            # asyncio leaves a connection open that it is accepting while its server closes.
            for listener in server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(_ACCEPTING):
                await asyncio.sleep(0)
            server.close()
            for relay in self._relays:
                relay.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)

    def snap(self, *, dialler: bool = True, acceptor: bool = True) -> int:
        """Reset all connections, at one side or at both. What has not passed yet is lost. Returns: the number of connections.

        The side whose connection is not reset notices nothing: what it sends vanishes.
        """
        pairs, self._pairs = self._pairs, []
        for ends in pairs:
            for end, resets in zip(ends, (dialler, acceptor), strict=True):
                raw: socket.socket = end.get_extra_info("socket")
                if resets and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.transport.abort()
        return len(pairs)

    async def _relay(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            await self.whole.wait()
            there, back = await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0))
            ends.append(back)
            self._pairs.append((writer, back))
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)
        finally:
            for end in ends:
                end.transport.abort()
            await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if self.whole.is_set() and not writer.is_closing():
                writer.write(data)
                self.passed += len(data)
        await self.whole.wait()
        writer.transport.abort()
