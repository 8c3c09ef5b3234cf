"""Draining: what a peer waits for, and for how long."""

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from in_process.peers import Peer, Peers, until
from meshd.agents.session.plan.drain import Drainer
from meshd.clock import SystemClock
from meshd.errors import PeerLost


@dataclass
class Work:
    """Numbers of stages and answers that run on a peer."""

    stages: int = 0
    answers: int = 0
    changes: list[bool] = field(default_factory=list)
    """The drainer's `draining` after each change of it."""


def drainer_of(peer: Peer, work: Work) -> Drainer:
    drainer = Drainer(
        links=peer.links,
        clock=SystemClock(),
        stages=lambda: work.stages,
        on_change=lambda: work.changes.append(drainer.draining),
    )
    drainer.register()
    return drainer


async def pair(peers: Peers, work: Work) -> tuple[Drainer, Drainer, Peer]:
    one, other = peers.start("a"), peers.start("b")
    asks, asked = drainer_of(one, Work()), drainer_of(other, work)
    one.dial(other)
    await one.next_up()
    return asks, asked, other


async def test_a_peer_on_which_nothing_runs_drains_at_once(peers: Peers) -> None:
    work = Work(answers=3)
    asks, asked, other = await pair(peers, work)
    assert await asks.drain(other.id, False, 5.0) == 0
    assert asked.draining
    assert not asks.draining
    assert work.changes == [True]


async def test_the_reply_comes_when_the_last_stage_has_ended(peers: Peers) -> None:
    work = Work(stages=2)
    asks, asked, other = await pair(peers, work)
    draining = asyncio.create_task(asks.drain(other.id, False, 5.0))
    await until(lambda: asked.draining)
    work.stages = 1
    await asyncio.sleep(0.1)
    assert not draining.done()
    work.stages = 0
    assert await draining == 0


async def test_at_the_timeout_the_reply_counts_the_stages_left_and_the_peer_still_drains(peers: Peers) -> None:
    work = Work(stages=2)
    asks, asked, other = await pair(peers, work)
    assert await asks.drain(other.id, False, 0.1) == 2
    assert asked.draining


async def test_a_drain_can_be_undone_while_another_request_waits_for_it(peers: Peers) -> None:
    work = Work(stages=2)
    asks, asked, other = await pair(peers, work)
    draining = asyncio.create_task(asks.drain(other.id, False, 5.0))
    await until(lambda: asked.draining)
    assert await asks.drain(other.id, True, 5.0) == 2
    assert await draining == 2
    assert not asked.draining
    assert work.changes == [True, False]


async def test_a_peer_can_drain_itself(peers: Peers) -> None:
    peer = peers.start("a")
    drainer = drainer_of(peer, Work())
    assert await drainer.drain(peer.id, False, 5.0) == 0
    assert drainer.draining


async def test_a_peer_that_is_lost_while_it_drains_is_an_error(peers: Peers) -> None:
    work = Work(stages=1)
    asks, asked, other = await pair(peers, work)
    draining = asyncio.create_task(asks.drain(other.id, False, 5.0))
    await until(lambda: asked.draining)
    await other.links.close("it stops")
    with pytest.raises(PeerLost):
        await draining


async def test_leaving_takes_no_time_when_nothing_runs(peers: Peers) -> None:
    drainer = drainer_of(peers.start("a"), Work())
    lines: list[str] = []
    began = time.monotonic()
    await drainer.leave(10.0, lines.append, answers=lambda: 0)
    assert time.monotonic() - began < 0.05
    assert lines == []
    assert drainer.leaving


async def test_leaving_waits_for_answers_and_stages_and_reports_it(peers: Peers) -> None:
    work = Work(stages=1, answers=2)
    drainer = drainer_of(peers.start("a"), work)
    lines: list[str] = []
    leaving = asyncio.create_task(drainer.leave(10.0, lines.append, answers=lambda: work.answers))
    await until(lambda: bool(lines))
    assert lines == ["waiting up to 10 s for 2 answers and 1 stage to end or move away"]
    assert work.changes == [True]
    work.answers = 0
    await asyncio.sleep(0.1)
    assert not leaving.done()
    work.stages = 0
    await leaving


@pytest.mark.parametrize("timeout_s", [0.0, 0.1])
async def test_leaving_waits_no_longer_than_its_timeout(peers: Peers, timeout_s: float) -> None:
    drainer = drainer_of(peers.start("a"), Work())
    began = time.monotonic()
    await drainer.leave(timeout_s, lambda text: None, answers=lambda: 1)
    assert timeout_s <= time.monotonic() - began < timeout_s + 0.5


async def test_a_leaving_peer_still_drains_after_an_undo(peers: Peers) -> None:
    peer = peers.start("a")
    drainer = drainer_of(peer, Work())
    await drainer.leave(0.0, lambda text: None, answers=lambda: 0)
    await drainer.drain(peer.id, True, 1.0)
    assert drainer.draining
