"""Peers that send one another weights, with short waits."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from in_process.peers import Peers
from in_process.weights import Sites
from meshd.agents.placement.weights import fetch as weight_fetch
from meshd.agents.placement.weights import sources as weight_sources


@pytest.fixture
async def sites(peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sites]:
    """Starts peers with links and disks; they are closed after the test."""
    monkeypatch.setattr(weight_fetch, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(weight_fetch, "_PAUSE_S", 0.05)
    monkeypatch.setattr(weight_fetch, "_LOOK_S", 0.05)
    monkeypatch.setattr(weight_sources, "_GRACE_S", 0.3)
    started = Sites(peers, tmp_path)
    yield started
    for site in started.all.values():
        await site.server.close()
