"""A real API server that accepts the keys of a file, over a coordinator that invents its answers."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fake_api.api_keys import LOCAL
from fake_api.words import WordsCoordinator
from fake_api.words_mesh import WordsMesh
from meshd.api.access.key_file import KeyFile
from meshd.api.access.ring import KeyRing
from meshd.api.http.app import create_app
from meshd.api.http.server import Server, serve
from meshd.clock import SystemClock
from meshd.state import StateFolder
from meshd.telemetry import Telemetry


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(StateFolder.open(tmp_path / "state"))


@pytest.fixture
async def server(coordinator: WordsCoordinator, telemetry: Telemetry, file: KeyFile) -> AsyncIterator[Server]:
    clock = SystemClock()
    keys = KeyRing(clock, telemetry, local=LOCAL, file=file)
    server = await serve(create_app(coordinator, WordsMesh(), telemetry, keys=keys, clock=clock), "127.0.0.1", 0)
    yield server
    await server.aclose()
