"""Connections of clients: how many, for how long, and which one is closed to make room."""

import asyncio
import socket
import sys

import pytest

from fake_api.clients import HEALTH, connections, is_open, status
from meshd.api.http.server import Server
from meshd.api.http.services import ClientLimits

LIMIT = 4
BUSY = (
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"model": '
)
"""The beginning of a request whose body never ends."""


@pytest.fixture
def limits() -> ClientLimits:
    return ClientLimits(connections=LIMIT, first_request_s=0.5, idle_s=3.0)


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
    accept_silent(server)
    async with connections(server, 1, sent) as (silent,), asyncio.timeout(10.0):
        assert await silent[0].read() == b""
