"""How long a link survives silence, with a clock that the test sets."""

import pytest

from in_process.clocks import SetClock
from meshd.agents.links.link import Link
from meshd.agents.links.link_table import LinkTable, Timing
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher
from meshd.types import PeerId

OWN, OTHER = PeerId("a" * 52), PeerId("b" * 52)


@pytest.fixture
def clock() -> SetClock:
    return SetClock(100.0)


@pytest.fixture
def table(clock: SetClock) -> LinkTable:
    linklog = LinkLog(clock)
    dispatcher = Dispatcher(lambda peer, message, payload: None, linklog)
    return LinkTable(OWN, dispatcher, clock, linklog, Timing(), lambda *_: None, lambda *_: None)


def up_link(table: LinkTable, clock: SetClock) -> Link:
    link = table.begin_dialled(OTHER, 1)
    link.up = True
    link.heard = link.up_since = clock.now
    return link


def beats(table: LinkTable, clock: SetClock, seconds: float) -> None:
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        table.check()


def test_a_link_ends_after_two_seconds_of_silence_and_not_before(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    beats(table, clock, 1.5)
    assert table.get(OTHER) is link
    beats(table, clock, 0.5)
    assert table.get(OTHER) is None
    assert link.gone.is_set()


def test_a_link_that_receives_messages_stays(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    for _ in range(10):
        beats(table, clock, 1.0)
        link.heard = clock.now
    assert table.get(OTHER) is link


def test_after_a_stall_of_this_process_each_peer_gets_one_more_interval(table: LinkTable, clock: SetClock) -> None:
    link = up_link(table, clock)
    clock.now += 30.0
    table.check()
    assert table.get(OTHER) is link
    beats(table, clock, 0.5)
    assert table.get(OTHER) is None


def test_a_link_that_does_not_come_up_in_time_ends(table: LinkTable, clock: SetClock) -> None:
    link = table.begin_dialled(OTHER, 1)
    beats(table, clock, 15.0)
    assert table.get(OTHER) is link
    beats(table, clock, 0.5)
    assert table.get(OTHER) is None


def test_an_ended_link_does_not_remove_its_successor(table: LinkTable, clock: SetClock) -> None:
    old = up_link(table, clock)
    old.end("replaced")
    new = up_link(table, clock)
    old.end("again")
    assert table.get(OTHER) is new
