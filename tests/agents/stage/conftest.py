"""Peers with real stages of a small model, for each backend."""

import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from meshd.kernels.backend import LoadedLayers
from meshd.kernels.registry import make_backend
from meshd.types import LayerRange
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import LLAMA


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def weights(request: pytest.FixtureRequest) -> Iterator[LoadedLayers]:
    loaded = make_backend(request.param, threads=1).load(LLAMA.spec, LayerRange(0, 4), LLAMA, embedding=True, head=True)
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
