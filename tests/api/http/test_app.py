from typing import Any

import aiohttp
import pytest

from meshd.api.http.app import create_app
from meshd.api.http.server import Server, serve
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
