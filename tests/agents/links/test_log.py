import pytest

from in_process.clocks import SetClock
from meshd.agents.links.log import LinkLog


@pytest.fixture
def clock() -> SetClock:
    return SetClock(100.0)


def test_a_repeated_refusal_is_logged_once_a_minute_and_kept_as_one_row(clock: SetClock, caplog: pytest.LogCaptureFixture) -> None:
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


def test_the_oldest_cause_is_forgotten_beyond_the_limit(clock: SetClock) -> None:
    linklog = LinkLog(clock)
    for number in range(257):
        assert linklog.warn(f"cause {number}", "text") is True
    assert linklog.warn("cause 1", "text") is False
    assert linklog.warn("cause 0", "text") is True


def test_a_row_is_a_copy_and_shows_when_it_was_last_seen(clock: SetClock) -> None:
    linklog = LinkLog(clock)
    linklog.refused("h:1", None, "no")
    clock.now = 130.0
    linklog.refused("h:1", None, "no")
    (row,) = linklog.rows()
    assert row["at"] == 130.0
    row["count"] = 99
    assert linklog.rows()[0]["count"] == 2


def test_a_refusal_is_shown_until_it_is_two_minutes_old(clock: SetClock) -> None:
    linklog = LinkLog(clock)
    linklog.refused("h:1", None, "no")
    clock.now += 119
    linklog.refused("h:2", None, "no")
    assert [row["address"] for row in linklog.rows()] == ["h:1", "h:2"]
    clock.now += 2
    assert [row["address"] for row in linklog.rows()] == ["h:2"]
