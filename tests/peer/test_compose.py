"""The composition of a peer: the order in which agents learn of an event, and what is connected with what."""

import pytest

from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.stage.host import StageHost
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.peer.compose import compose
from meshd.peer.parts import Parts
from meshd.types import PeerId

GONE = PeerId("a" * 52)


async def test_the_coordinator_is_the_first_to_learn_of_a_lost_peer(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for agent in (StageHost, Deputy, JournalWriters, Coordinator):
        monkeypatch.setattr(agent, "on_peer_gone", lambda self, peer, *_: order.append(f"{type(self).__name__} {peer}"))
    compose(parts)
    parts.signals.peer_gone(GONE, "cut")
    assert order[0] == f"Coordinator {GONE}"
    assert sorted(order) == [f"{name} {GONE}" for name in ("Coordinator", "Deputy", "JournalWriters", "StageHost")]


async def test_a_step_of_a_pull_becomes_an_event(parts: Parts) -> None:
    peer = compose(parts)
    before = peer.events.last
    parts.signals.pull_progress(PullProgress(model="tiny", source="hub", phase=PullPhase.DOWNLOADING, done_bytes=1))
    _, lines = peer.events.since(before)
    assert len(lines) == 1
