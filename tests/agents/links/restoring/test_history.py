"""Two sides of a link that breaks again and again: each message arrives once and in order, and what is kept stays bounded."""

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.frames import one_step
from meshd.agents.links.restoring import history as history_module
from meshd.agents.links.restoring.history import (
    KEPT_BYTES,
    REPORT_BYTES,
    REPORT_MESSAGES,
    LinkHistory,
    SentFrame,
    SentMessages,
    is_counted,
)
from meshd.errors import Overloaded, ProtocolViolation
from meshd.protocol.messages import Ack, Error, Heartbeat, Lane, Probe, Received


def frame(number: int = 0, size: int = 0) -> SentFrame:
    return SentFrame(number.to_bytes(4, "big"), memoryview(bytes(size)))


class Side:
    """One peer's end of a link: its history, and what it was given by the other one."""

    def __init__(self) -> None:
        self.history = LinkHistory(1)
        self.lanes: dict[Lane, deque[SentFrame | tuple[int, int]]] = {lane: deque() for lane in Lane}
        """What was written and has not arrived at the other side: messages, and reports on the control lane."""
        self.sent = dict.fromkeys(Lane, 0)
        self.taken: dict[Lane, list[int]] = {lane: [] for lane in Lane}

    def send(self, lane: Lane, size: int, *, broken: bool) -> None:
        sent = self.history.sent[lane]
        new = frame(self.sent[lane], size)
        sent.check_room(new)
        at_once = not (broken or sent.unwritten)
        if at_once:
            self.lanes[lane].append(new)
        sent.keep(new, written=at_once)
        self.sent[lane] += 1

    def write(self, lane: Lane) -> None:
        """Give the next kept message to the connection, as when it has room for one."""
        sent = self.history.sent[lane]
        if (kept := sent.next) is not None:
            self.lanes[lane].append(kept)
            sent.wrote()

    def take(self, lane: Lane, item: SentFrame | tuple[int, int]) -> None:
        if isinstance(item, tuple):
            self.history.acknowledge(item)
            return
        self.taken[lane].append(int.from_bytes(item.header, "big"))
        if self.history.note_received(lane, len(item.payload)):
            self.report()

    def report(self) -> None:
        self.lanes[Lane.CONTROL].append(self.history.report())


@given(seed=st.integers(0, 2**32), breaks=st.integers(0, 12), sizes=st.sampled_from([(0, 10), (0, 400_000)]))
def test_every_message_arrives_once_and_in_order_however_often_the_link_breaks(
    seed: int, breaks: int, sizes: tuple[int, int]
) -> None:
    dice = random.Random(seed)
    sides = Side(), Side()
    broken = False
    for _ in range(400):
        one = dice.randrange(2)
        side, other = sides[one], sides[1 - one]
        lane = dice.choice(list(Lane))
        match dice.choice(["send", "send", "arrive", "arrive", "write", "report", "break" if breaks else "arrive"]):
            case "send":
                side.send(lane, dice.randint(*sizes), broken=broken)
            case "arrive" if side.lanes[lane] and not broken:
                other.take(lane, side.lanes[lane].popleft())
            case "write" if not broken:
                side.write(lane)
            case "report" if not broken:
                side.report()
            case "break":
                breaks, broken = breaks - 1, True
                for each in sides:
                    for queue in each.lanes.values():
                        queue.clear()
        if broken and dice.random() < 0.3:
            restore(*sides)
            broken = False
    if broken:
        restore(*sides)
    for _ in range(700):
        for side, other in (sides, sides[::-1]):
            for lane in Lane:
                side.write(lane)
                if side.lanes[lane]:
                    other.take(lane, side.lanes[lane].popleft())
    for side, other in (sides, sides[::-1]):
        for lane in Lane:
            assert other.taken[lane] == list(range(side.sent[lane]))
            assert len(side.history.sent[lane].kept) <= 2 * REPORT_MESSAGES


def restore(one: Side, other: Side) -> None:
    told = tuple(one.history.received), tuple(other.history.received)
    assert one.history.can_restart_at(told[1])
    assert other.history.can_restart_at(told[0])
    one.history.restart_at(told[1])
    other.history.restart_at(told[0])


def test_messages_about_the_link_itself_are_not_counted_and_errors_are() -> None:
    uncounted = [Heartbeat(sequence=1, sent_ns=1), Probe(request=1), Received(received=(0, 0))]
    counted = [one_step(1), Ack(session="5e" * 16, epoch=1, stage=1, next_seq=0, credit=1), Error(code="x", message="y")]
    assert [is_counted(message) for message in (*uncounted, *counted)] == [False] * 3 + [True] * 3


def test_a_side_that_is_told_of_more_than_it_has_sent_reports_a_violation() -> None:
    sent = SentMessages()
    sent.keep(frame(), written=True)
    sent.keep(frame(), written=False)
    with pytest.raises(ProtocolViolation, match="2 messages were received, but only 1 were sent"):
        sent.acknowledge(2)
    sent.acknowledge(1)
    sent.acknowledge(0)
    assert (sent.received, sent.total) == (1, 2)


def test_a_history_restarts_only_where_it_still_has_everything() -> None:
    history = LinkHistory(1)
    for _ in range(3):
        history.sent[Lane.CONTROL].keep(frame(), written=True)
    history.acknowledge((1, 0))
    assert [history.can_restart_at((count, 0)) for count in range(5)] == [False, True, True, True, False]
    assert not history.can_restart_at((2, 1))


def test_what_is_kept_is_bounded_and_half_of_it_must_be_free_before_waiting_senders_are_called() -> None:
    sent = SentMessages()
    large = frame(size=KEPT_BYTES // 4)
    for _ in range(3):
        sent.check_room(large)
        sent.keep(large, written=True)
    with pytest.raises(Overloaded):
        sent.check_room(large)
    assert not sent.has_room
    sent.acknowledge(2)
    assert sent.has_room
    assert sent.kept_bytes == large.size


def test_what_has_arrived_is_reported_after_some_messages_or_bytes() -> None:
    history = LinkHistory(1)
    assert [history.note_received(Lane.BULK, 0) for _ in range(REPORT_MESSAGES)] == [False] * (REPORT_MESSAGES - 1) + [True]
    assert history.report() == (0, REPORT_MESSAGES)
    assert not history.note_received(Lane.CONTROL, REPORT_BYTES - 1)
    assert history.note_received(Lane.CONTROL, 1)


def test_a_link_that_the_same_message_breaks_again_and_again_is_given_up() -> None:
    history, often = LinkHistory(1), history_module._FUTILE
    assert not any(history.is_futile() for _ in range(2 * often)), "an idle link may break any number of times"
    for arrived in range(2):
        history.sent[Lane.CONTROL].keep(frame(), written=True)
        assert not any(history.is_futile() for _ in range(often))
        history.acknowledge((arrived + 1, 0))
    history.sent[Lane.BULK].keep(frame(), written=True)
    assert not any(history.is_futile() for _ in range(often))
    assert history.is_futile()
