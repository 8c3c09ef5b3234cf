"""When a link counts as lost, by a clock that the test sets."""

from dataclasses import dataclass

import pytest

from meshd.agents.links.link import Link
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher
from meshd.agents.links.table import LinkTable, Timing
from meshd.clock import SystemClock
from meshd.protocol.messages import HeartbeatAck
from meshd.types import PeerId

OWN, OTHER = PeerId("a" * 52), PeerId("b" * 52)


@dataclass
class SetClock(SystemClock):
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def table(clock: SetClock) -> LinkTable:
    linklog = LinkLog(clock)
    dispatcher = Dispatcher(lambda peer, message, payload: None, linklog)
    return LinkTable(OWN, dispatcher, clock, linklog, Timing(), lambda *_: None, lambda *_: None)


def up_link(table: LinkTable, clock: SetClock) -> Link:
    link = table.dialled(OTHER, 1)
    link.up = True
    link.heard = link.up_since = clock.now
    return link


def beats(table: LinkTable, clock: SetClock, seconds: float) -> None:
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        table.check()


def test_a_silent_peer_is_lost_after_two_seconds_and_not_before(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    beats(table, clock, 1.5)
    assert table.get(OTHER) is link
    beats(table, clock, 0.5)
    assert table.get(OTHER) is None
    assert link.gone.is_set()


def test_a_peer_that_is_heard_stays(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    for _ in range(10):
        beats(table, clock, 1.0)
        link.heard = clock.now
    assert table.get(OTHER) is link


def test_after_a_stall_of_our_own_each_peer_gets_one_more_interval(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    clock.now += 30.0
    table.check()
    assert table.get(OTHER) is link
    beats(table, clock, 0.5)
    assert table.get(OTHER) is None


def test_a_link_that_does_not_come_up_is_given_up(table: LinkTable, clock: SetClock) -> None:
    link = table.dialled(OTHER, 1)
    beats(table, clock, 15.0)
    assert table.get(OTHER) is link
    beats(table, clock, 0.5)
    assert table.get(OTHER) is None


def test_an_ended_link_does_not_take_its_successor_along(table: LinkTable, clock: SetClock) -> None:
    old = up_link(table, clock)
    old.end("replaced")
    new = up_link(table, clock)
    old.end("again")
    assert table.get(OTHER) is new


def test_round_trips_are_smoothed_and_nonsense_is_ignored(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    link._sequence = 3
    for sequence, rtt_s in ((1, 0.010), (2, 0.018), (3, -5.0), (9, 0.001)):
        link.beat_answered(HeartbeatAck(sequence=sequence, sent_ns=int((clock.now - rtt_s) * 1e9)), clock.now)
    assert link.rtt_min_s == pytest.approx(0.010, abs=1e-6)
    assert link.rtt_mean_s == pytest.approx(0.011, abs=1e-6)


def test_the_same_trouble_is_logged_once_a_minute_and_kept_as_one_row(clock: SetClock, caplog: pytest.LogCaptureFixture) -> None:
    linklog = LinkLog(clock)
    assert linklog.refused("h:1", None, "no") is True
    for _ in range(100):
        assert linklog.refused("h:1", None, "no") is False
    assert len(caplog.records) == 1
    assert [(row["address"], row["count"]) for row in linklog.rows()] == [("h:1", 101)]
    for number in range(1000):
        linklog.refused(f"h{number}:1", None, "no")
    assert len(linklog.rows()) == 64
    clock.now += 61
    assert linklog.warn("refused h:1", "%s", "again") is True
