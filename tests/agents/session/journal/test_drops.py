"""The queue of JOURNAL_DROP messages: sent at once, after a delay, or when the peer can be reached."""

import pytest

from ids import session_id
from in_process.journals import HandClock, S
from in_process.peers import Peer, Peers, until
from meshd.agents.session.journal.drops import KEEP_ENDED_S, DropQueue
from meshd.protocol.messages import JournalDrop
from meshd.types import SessionId


class Deputy:
    """A peer that records the JOURNAL_DROP messages that it receives."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.dropped: list[tuple[SessionId, int]] = []
        peer.links.register(JournalDrop, lambda sender, message, payload: self.dropped.append((message.session, message.epoch)))


@pytest.fixture
async def deputy(peers: Peers) -> Deputy:
    return Deputy(peers.start("b"))


@pytest.fixture
async def coordinator(peers: Peers) -> Peer:
    return peers.start("a")


async def link(coordinator: Peer, deputy: Deputy) -> None:
    coordinator.dial(deputy.peer)
    await coordinator.next_up()


async def test_a_drop_without_delay_is_sent_at_once_and_only_once(coordinator: Peer, deputy: Deputy) -> None:
    await link(coordinator, deputy)
    clock = HandClock()
    drops = DropQueue(coordinator.links, clock)
    drops.add(deputy.peer.id, S, 3)
    drops.send_due(clock.now + 1)
    drops.add(deputy.peer.id, session_id("last"), 1)
    await until(lambda: (session_id("last"), 1) in deputy.dropped)
    assert deputy.dropped == [(S, 3), (session_id("last"), 1)]


async def test_a_delayed_drop_is_sent_when_it_is_due_unless_it_is_revoked(coordinator: Peer, deputy: Deputy) -> None:
    await link(coordinator, deputy)
    clock = HandClock()
    drops = DropQueue(coordinator.links, clock)
    drops.add(deputy.peer.id, S, 1, after_s=10.0)
    drops.add(deputy.peer.id, session_id("kept"), 1, after_s=10.0)
    drops.revoke(deputy.peer.id, session_id("kept"))
    drops.send_due(clock.now + 9.9)
    drops.add(deputy.peer.id, session_id("now"), 1)
    drops.send_due(clock.now + 10.0)
    await until(lambda: len(deputy.dropped) == 2)
    assert deputy.dropped == [(session_id("now"), 1), (S, 1)]


async def test_a_peer_that_cannot_be_reached_gets_the_drop_later(coordinator: Peer, deputy: Deputy) -> None:
    clock = HandClock()
    drops = DropQueue(coordinator.links, clock)
    drops.add(deputy.peer.id, S, 1)
    await link(coordinator, deputy)
    drops.send_due(clock.now + KEEP_ENDED_S)
    await until(lambda: deputy.dropped == [(S, 1)])


async def test_a_drop_is_given_up_once_the_record_has_expired_anyway(coordinator: Peer, deputy: Deputy) -> None:
    clock = HandClock()
    drops = DropQueue(coordinator.links, clock)
    drops.add(deputy.peer.id, S, 1)
    drops.send_due(clock.now + KEEP_ENDED_S + 1)
    await link(coordinator, deputy)
    drops.send_due(clock.now)
    drops.add(deputy.peer.id, session_id("last"), 1)
    await until(lambda: deputy.dropped == [(session_id("last"), 1)])


async def test_the_oldest_drops_are_discarded_when_there_are_too_many(coordinator: Peer, deputy: Deputy) -> None:
    clock = HandClock()
    drops = DropQueue(coordinator.links, clock)
    for number in range(1025):
        drops.add(deputy.peer.id, session_id(f"{number}"), 1)
    await link(coordinator, deputy)
    drops.send_due(clock.now)
    await until(lambda: len(deputy.dropped) == 1024)
    assert deputy.dropped[0] == (session_id("1"), 1)
