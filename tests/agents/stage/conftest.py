"""Peers with real stages of a small model, on a backend that hides its hidden states and KV, as a GPU would."""

import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from meshd.kernels.backend import LoadedLayers
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import LLAMA, load


@pytest.fixture(scope="module")
def weights() -> Iterator[LoadedLayers]:
    loaded = load("opaque", LLAMA)
    yield loaded
    loaded.close()


@pytest.fixture
async def mesh(weights: LoadedLayers) -> AsyncIterator[StageMesh]:
    async with StageMesh(LLAMA.spec, weights) as started:
        yield started


@pytest.fixture(autouse=True)
def no_logged_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test if an error was logged: a message handler that raises is only visible in the log."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
