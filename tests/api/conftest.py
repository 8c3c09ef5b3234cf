"""A real HTTP server over a coordinator that invents its answers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from openai import AsyncOpenAI

from fake_api.words import WordsCoordinator
from meshd.agents.service import PlacementStep, PlaceRequest, PlanRequest
from meshd.api.http.app import create_app
from meshd.api.http.server import Server, serve
from meshd.api.http.services import ClientLimits
from meshd.clock import SystemClock
from meshd.errors import InvalidRequest, NoPeer, PeerLost, UnknownModel, UnknownSession
from meshd.telemetry import Telemetry
from meshd.types import LayerRange, PeerId

SESSION = "5e" * 16
"""The session that `WordsMesh` runs."""


class WordsMesh:
    """A cluster of one peer whose answers are fixed."""

    def identity(self) -> dict[str, Any]:
        return {"id": "p" * 52, "name": "here", "notices": []}

    def peers(self) -> list[dict[str, Any]]:
        return [{"id": "p" * 52, "name": "here", "state": "alive"}]

    def links(self) -> list[dict[str, Any]]:
        return []

    def known_models(self) -> list[dict[str, Any]]:
        return [{"name": "words"}]

    def plans(self) -> list[dict[str, Any]]:
        return []

    def sessions(self) -> list[dict[str, Any]]:
        return []

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "peer_joined", "at": 1.0}
        await asyncio.Event().wait()

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        if request.model != "words":
            raise UnknownModel(f"no model {request.model!r}")
        return {"model": request.model, "objective": request.objective, "stages": []}

    async def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        if request.model == "missing":
            raise UnknownModel("no model 'missing'")
        layers = LayerRange(0, 2)
        yield PlacementStep(peer=PeerId("p" * 52), name="here", layers=layers, state="loading", progress=0.5)
        if request.model == "breaks":
            raise PeerLost("peer there is lost")
        yield PlacementStep(peer=PeerId("p" * 52), name="here", layers=layers, state="active", progress=1.0)

    async def unplace(self, model: str) -> int:
        return 1024

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        if peer != "there":
            raise NoPeer(f"no peer is called {peer!r}", hint="see `meshd status`")
        return {"peer": "q" * 52, "name": "there", "sessions_left": 0 if undo or timeout_s > 1 else 2}

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        if session != SESSION:
            raise UnknownSession(f"no live peer runs or keeps session {session}")
        if source == target:
            raise InvalidRequest("it is there already", param="source")
        return {"session": session, "plan": f"{source or 'here'}:0-1,{target}:1-2", "pause_ms": 1.5}

    async def story(self, session: str) -> list[dict[str, Any]]:
        if session != SESSION:
            raise UnknownSession(f"no live peer knows session {session}")
        return [{"at_s": 0.0, "peer": "p" * 52, "name": "here", "what": "planned", "epoch": 1}]

    async def probe_links(self) -> list[dict[str, Any]]:
        return [{"peer": "q" * 52, "rtt_s": 0.001}]


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
    app = create_app(coordinator, WordsMesh(), telemetry, api_key=api_key, clock=SystemClock(), limits=limits)
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
