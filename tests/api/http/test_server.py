"""Connections of clients: how many, for how long, and which one is closed to make room."""

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing

import aiohttp
import pytest

from meshd.api.http.server import CONNECTIONS, Server, bind
from meshd.api.http.services import ClientLimits
from meshd.errors import ConfigError

LIMIT = 4
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BUSY = (
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"model": '
)
"""The beginning of a request whose body never ends."""


@pytest.fixture
def limits() -> ClientLimits:
    return ClientLimits(connections=LIMIT, first_request_s=0.5, idle_s=3.0)


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


def accept_silent(server: Server) -> None:
    """Have the system accept connections on which nothing has come, as every system but Linux does."""
    for listener in server.listeners:
        if sys.platform == "linux":
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0)


async def test_a_flood_of_silent_connections_leaves_room_for_requests(server: Server) -> None:
    accept_silent(server)
    async with connections(server, 10 * LIMIT) as flood, connections(server, 1) as (client,):
        assert await status(client) == 200
        assert sum([await is_open(stream) for stream in flood]) == LIMIT - 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps silent connections to itself")
async def test_silent_connections_stay_with_the_system(server: Server) -> None:
    async with connections(server, 10 * LIMIT) as flood, connections(server, 1) as (client,):
        assert await status(client) == 200
        assert all([await is_open(stream) for stream in flood])
        assert len(server.runner.app[CONNECTIONS]) == 1
        assert await status(flood[0]) == 200


async def test_of_many_clients_at_once_each_gets_its_answer(server: Server) -> None:
    clients = await asyncio.gather(*(asyncio.open_connection(*server.address) for _ in range(10 * LIMIT)))
    try:
        for _, writer in clients:
            writer.write(HEALTH)
        answers = asyncio.gather(*(status(client, b"") for client in clients))
        most = 0
        while not answers.done():
            assert server.runner.server is not None
            most = max(most, len(server.runner.server.connections))
            await asyncio.sleep(0)
        assert await answers == [200] * 10 * LIMIT
        assert most <= 2 * LIMIT  # those that have just been closed are still among them
    finally:
        for _, writer in clients:
            writer.close()


async def test_a_connection_that_was_used_stays_while_silent_ones_are_closed(server: Server) -> None:
    accept_silent(server)
    async with connections(server, 1, HEALTH) as (used,):
        assert await status(used, b"") == 200
        async with connections(server, 10 * LIMIT):
            assert await status(used) == 200


async def test_of_connections_between_requests_the_least_recently_used_is_closed(server: Server) -> None:
    async with connections(server, LIMIT) as clients:
        for client in [*clients, clients[0]]:
            assert await status(client) == 200
        async with connections(server, 1) as (newest,):
            assert await status(newest) == 200
            assert [await is_open(client) for client in clients] == [True, False, True, True]


async def test_a_connection_with_a_running_request_is_never_closed_to_make_room(server: Server) -> None:
    async with connections(server, LIMIT, BUSY) as busy, connections(server, 1) as (further,):
        assert await status(further) == 503
        assert all([await is_open(stream) for stream in busy])
        busy[0][1].close()
        async with asyncio.timeout(10.0):
            while await _asked_anew(server) != 200:
                pass


async def _asked_anew(server: Server) -> int | None:
    async with connections(server, 1) as (client,):
        return await status(client)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
async def test_a_connection_whose_first_request_does_not_come_is_closed(server: Server, sent: bytes) -> None:
    async with connections(server, 1, sent) as (silent,), asyncio.timeout(10.0):
        assert await silent[0].read() == b""


async def test_a_request_that_is_not_http_costs_one_line_at_debug(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    malformed = [b"GET /health HTTP/1.1\r\nHost: h\r\n" + b"x" * 9000 + b"\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n", b"GET\r\n\r\n"]
    for sent in malformed:
        async with connections(server, 1) as (client,):
            assert await status(client, sent) == 400
    lines = [record for record in caplog.records if record.name.startswith(("aiohttp", "meshd.api.http"))]
    assert {record.levelno for record in lines} == {logging.DEBUG}
    assert not any(record.exc_info for record in lines)
    assert 0 < max(len(record.getMessage()) for record in lines) < 500


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        yield other.getsockname()[1]


def test_a_taken_port_is_found_before_anything_listens(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"can't listen on 127.0.0.1:{taken}: Address already in use; choose another address"):
        bind("127.0.0.1", taken)


def test_an_unknown_host_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"can't listen on no\.such\.host\.invalid:0: .*; choose another address with --api"):
        bind("no.such.host.invalid", 0)


def test_a_bound_address_is_not_served_yet() -> None:
    (listener,) = bind("127.0.0.1", 0)
    with closing(listener), pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname(), timeout=5.0)


async def test_a_closed_server_refuses_connections_and_may_be_closed_again(server: Server, http: aiohttp.ClientSession) -> None:
    await server.aclose()
    await server.aclose()
    with pytest.raises(aiohttp.ClientConnectionError):
        await http.get("/health")


async def test_the_address_has_the_port_that_was_bound(server: Server) -> None:
    host, port = server.address
    assert port > 0
    assert server.url == f"http://{host}:{port}"
