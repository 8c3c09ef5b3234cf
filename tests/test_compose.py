"""The composition of a peer: which messages have handlers, and the order in which agents learn of an event."""

from collections.abc import AsyncIterator

import pytest

from meshd import daemon
from meshd.agents.device.descriptors import share_descriptors
from meshd.agents.device.probe import probe
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.stage.host import StageHost
from meshd.clock import SystemClock
from meshd.compose import Parts, compose
from meshd.config import Config
from meshd.protocol.identity import choose_cluster_key, load_identity
from meshd.protocol.messages import REGISTRY, Error, Goodbye, Heartbeat, HeartbeatAck, Hello, Probe, Reply
from meshd.state import StateFolder
from meshd.telemetry import Telemetry
from meshd.types import PeerId

GONE = PeerId("a" * 52)
LINK_LEVEL = {Hello, Heartbeat, HeartbeatAck, Goodbye, Probe}
"""Messages that links handle without an agent."""


@pytest.fixture
async def parts(local_config: Config) -> AsyncIterator[Parts]:
    """The parts of a real daemon that does not run."""
    clock = SystemClock()
    folder = StateFolder.open(local_config.state)
    cluster, _ = choose_cluster_key(folder, None, clock.random_bytes)
    identity = load_identity(folder, cluster, clock.random_bytes)
    measured = await probe(local_config.cache, clock=clock, threads=1, backend="torch")
    made = daemon._parts(local_config, identity, measured, clock, Telemetry(), daemon.Sockets([], []), share_descriptors(1024))
    yield made
    made.compute.close()


async def test_every_message_of_the_protocol_has_a_handler(parts: Parts) -> None:
    peer = compose(parts)
    peer.register()
    handled = []
    for message_type in REGISTRY.values():
        if message_type in LINK_LEVEL or (issubclass(message_type, Reply) and message_type is not Error):
            continue
        with pytest.raises(ValueError, match="has a handler already"):
            peer.links.register(message_type, lambda *_: None)
        handled.append(message_type)
    assert len(handled) > 20


async def test_the_coordinator_is_the_first_to_learn_of_a_lost_peer(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for agent in (StageHost, Deputy, JournalWriters, Coordinator):
        monkeypatch.setattr(agent, "on_peer_gone", lambda self, peer, *_: order.append(f"{type(self).__name__} {peer}"))
    compose(parts)
    parts.signals.peer_gone(GONE, "cut")
    assert order[0] == f"Coordinator {GONE}"
    assert sorted(order) == [f"{name} {GONE}" for name in ("Coordinator", "Deputy", "JournalWriters", "StageHost")]


async def test_the_stages_get_a_token_before_the_coordinator(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for agent in (Coordinator, StageHost):
        monkeypatch.setattr(agent, "on_token", lambda self, *_: order.append(type(self).__name__))
    peer = compose(parts)
    peer._on_token(GONE, None, memoryview(b""))  # type: ignore[arg-type]
    assert order == ["StageHost", "Coordinator"]
