from typing import Any

import aiohttp
import pytest

from meshd.api.http.app import Server, create_app, serve
from meshd.clock import SystemClock
from meshd.errors import ConfigError
from meshd.telemetry import Telemetry


async def test_every_response_has_another_request_id(http: aiohttp.ClientSession) -> None:
    ids = set()
    for path in ("/health", "/health", "/nothing"):
        async with http.get(path) as response:
            ids.add(response.headers["x-request-id"])
    assert len(ids) == 3


async def test_a_taken_port_is_reported(server: Server, coordinator: Any) -> None:
    app = create_app(coordinator, coordinator, Telemetry(), api_key=None, clock=SystemClock())
    with pytest.raises(ConfigError, match="can't listen on"):
        await serve(app, *server.address)


async def test_the_address_has_the_port_that_was_bound(server: Server) -> None:
    host, port = server.address
    assert port > 0
    assert server.url == f"http://{host}:{port}"


async def test_a_closed_server_refuses_connections_and_may_be_closed_again(server: Server, http: aiohttp.ClientSession) -> None:
    await server.aclose()
    await server.aclose()
    with pytest.raises(aiohttp.ClientConnectionError):
        await http.get("/health")
