"""Peers with real links, for the tests of agents."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.peers import Peers


@pytest.fixture
async def peers(tmp_path: Path) -> AsyncIterator[Peers]:
    """Starts peers on loopback, and stops them after the test."""
    started = Peers(tmp_path)
    yield started
    await started.stop()
