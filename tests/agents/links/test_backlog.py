"""Messages that wait for room on a full lane."""

from collections.abc import Callable
from typing import Any

import pytest

from in_process.frames import one_step
from meshd.agents.links.backlog import Backlog
from meshd.errors import MeshdError, Overloaded, PeerLost
from meshd.protocol.messages import Ack, Lane, Message, StepKind, Steps
from meshd.types import PeerId

A, B = PeerId("a" * 52), PeerId("b" * 52)


class Lanes:
    """Stands for `Links`: lanes that are full or lost on demand."""

    def __init__(self) -> None:
        self.full: set[tuple[PeerId, Lane]] = set()
        self.lost: set[PeerId] = set()
        self.sent: list[tuple[PeerId, int]] = []
        self.waiting: list[Callable[[], None]] = []

    def send(self, peer: PeerId, message: Message, payload: Any = None) -> None:
        if peer in self.lost:
            raise PeerLost("no link")
        if (peer, message.send_lane) in self.full:
            raise Overloaded("the lane is full")
        self.sent.append((peer, message.steps[0].seq if isinstance(message, Steps) else -1))

    def when_room(self, peer: PeerId, lane: Lane, callback: Callable[[], None]) -> None:
        self.waiting.append(callback)

    def has_room(self) -> None:
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            callback()


@pytest.fixture
def lanes() -> Lanes:
    return Lanes()


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def backlog(lanes: Lanes, calls: list[str]) -> Backlog:
    links: Any = lanes
    return Backlog(links, on_room=lambda: calls.append("room"))


def send(backlog: Backlog, peer: PeerId, step: int, wanted: bool = True) -> list[MeshdError]:
    failures: list[MeshdError] = []
    backlog.send(peer, one_step(step, kind=StepKind.PREFILL), bytes(4), wanted=lambda: wanted, failed=failures.append)
    return failures


def test_messages_keep_their_order_on_a_lane_and_other_lanes_do_not_wait(lanes: Lanes, backlog: Backlog, calls: list[str]) -> None:
    lanes.full.add((A, Lane.BULK))
    send(backlog, A, 0)
    send(backlog, B, 1)
    lanes.full.clear()
    send(backlog, A, 2)
    backlog.send(A, Ack(session="s", epoch=1, stage=1, next_seq=0, credit=1), None, wanted=lambda: True, failed=lambda error: None)
    assert lanes.sent == [(B, 1), (A, -1)]
    assert (backlog.waits(A, Lane.BULK), backlog.waits(B, Lane.BULK), len(backlog)) == (True, False, 2)
    lanes.has_room()
    assert lanes.sent[2:] == [(A, 0), (A, 2)]
    assert (len(backlog), calls) == (0, ["room"])


def test_a_lane_that_is_full_again_waits_again(lanes: Lanes, backlog: Backlog, calls: list[str]) -> None:
    lanes.full.add((A, Lane.BULK))
    send(backlog, A, 0)
    lanes.has_room()
    assert (lanes.sent, calls) == ([], [])
    lanes.full.clear()
    lanes.has_room()
    assert lanes.sent == [(A, 0)]


def test_a_message_that_is_not_wanted_any_more_is_dropped(lanes: Lanes, backlog: Backlog) -> None:
    lanes.full.add((A, Lane.BULK))
    send(backlog, A, 0, wanted=False)
    send(backlog, A, 1)
    lanes.full.clear()
    lanes.has_room()
    assert lanes.sent == [(A, 1)]


def test_a_lost_link_fails_each_message_once(lanes: Lanes, backlog: Backlog) -> None:
    lanes.full.add((A, Lane.BULK))
    waited = [send(backlog, A, 0), send(backlog, A, 1)]
    assert waited == [[], []]
    lanes.lost.add(A)
    lanes.has_room()
    at_once = send(backlog, A, 2)
    assert [len(failures) for failures in (*waited, at_once)] == [1, 1, 1]
