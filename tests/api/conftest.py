"""A real HTTP server over a coordinator that invents its answers."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from openai import AsyncOpenAI

from fake_api.api_keys import LOCAL
from fake_api.words import WordsCoordinator
from fake_api.words_mesh import WordsMesh
from meshd.api.access.ring import KeyRing
from meshd.api.http.app import create_app
from meshd.api.http.server import Server, serve
from meshd.api.http.services import ClientLimits
from meshd.clock import SystemClock
from meshd.telemetry import Telemetry


@pytest.fixture
async def coordinator() -> AsyncIterator[WordsCoordinator]:
    coordinator = WordsCoordinator()
    yield coordinator
    await coordinator.aclose()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def limits() -> ClientLimits:
    return ClientLimits()


@pytest.fixture
def api_key() -> str | None:
    return None


@pytest.fixture
async def server(
    coordinator: WordsCoordinator, telemetry: Telemetry, limits: ClientLimits, api_key: str | None
) -> AsyncIterator[Server]:
    clock = SystemClock()
    keys = KeyRing(clock, telemetry, default=api_key, local=LOCAL)
    app = create_app(coordinator, WordsMesh(), telemetry, keys=keys, clock=clock, limits=limits)
    server = await serve(app, "127.0.0.1", 0)
    yield server
    await server.aclose()


@pytest.fixture
def base_url(server: Server) -> str:
    """The URL of a daemon. Suites that also run against real daemons use only this, `model`, `api_key` and `openai_client`."""
    return server.url


@pytest.fixture
def model() -> str:
    """A model that the daemon at `base_url` can answer with."""
    return "words"


@pytest.fixture
async def openai_client(base_url: str, api_key: str | None) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=api_key or "none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url, timeout=aiohttp.ClientTimeout(10)) as session:
        yield session


@pytest.fixture
def events_of() -> Callable[[aiohttp.ClientResponse], Any]:
    """A function that reads a whole event stream. It returns the decoded data of each event, and `[DONE]` unchanged."""

    async def read(response: aiohttp.ClientResponse) -> list[Any]:
        lines = (await response.text()).split("\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [item if item == "[DONE]" else msgspec.json.decode(item) for item in data]

    return read
