"""What peers keep does not grow with time: the short form of `days.py`, and that its count sees a leak."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from sim.kept import kept

sys.path.insert(0, str(Path(__file__).parent))

from days import Days, _growth

from meshd.agents.observe.story import Story
from meshd.clock import SystemClock
from meshd.types import SessionId


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_days_of_churn_leave_no_table_larger() -> None:
    days = Days(seed=3, peers=3, days=2.0)
    days.run()
    assert days.growing() == []
    assert days.answered > 100


def test_members_are_counted_by_the_place_where_they_are_kept() -> None:
    story = Story(SystemClock())
    for number in range(7):
        story.note(SessionId(f"{number:032}"), "planned", tokens=number)
    counts = kept(story)
    assert counts["Story._sessions"] >= 7
    assert counts["_Lines.lines"] == 7


@pytest.mark.parametrize(("sizes", "grows"), [([5] * 40, False), (list(range(40)), False), (list(range(0, 400, 10)), True)])
def test_growth_is_a_higher_peak_in_the_last_quarter(sizes: list[int], grows: bool) -> None:
    assert bool(_growth("p0", "a table", sizes)) == grows


def test_a_leaking_peer_is_found() -> None:
    days = Days(seed=1, peers=2, days=1.0)
    for burst in range(40):
        days.counts["p0"].append(Counter({"Leak.entries": 20 * burst}))
        days.tasks.append(10)
    assert [line.split(" grows")[0] for line in days.growing()] == ["p0: Leak.entries", "p0: all tables"]
    days._close()
