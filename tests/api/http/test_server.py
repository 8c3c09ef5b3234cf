"""The server's address, and requests that are not HTTP."""

import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import closing

import aiohttp
import pytest

from fake_api.clients import connections, is_open, status
from meshd.api.http.connections import CONNECTIONS
from meshd.api.http.server import Server, bind
from meshd.errors import ConfigError


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps silent connections to itself")
async def test_silent_connections_stay_with_the_system(server: Server) -> None:
    async with connections(server, 40) as flood, connections(server, 1) as (client,):
        assert await status(client) == 200
        assert all([await is_open(stream) for stream in flood])
        assert len(server.runner.app[CONNECTIONS]) == 1
        assert await status(flood[0]) == 200


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
