"""Where a session is stuck, from two looks at its stages."""

import pytest

from meshd.agents.watch import Where, stuck_at

KNOWN = 20
"""Tokens of prompt and answer that the coordinator has: position 19 is being computed."""


def stages(*pairs: tuple[int, int]) -> list[Where]:
    return [Where(due, sent, 0.0) for due, sent in pairs]


@pytest.mark.parametrize(
    ("after", "fault"),
    [
        (stages((20, 20), (19, 19), (19, 19)), 1),
        (stages((20, 20), (20, 20), (19, 19)), 2),
        (stages((20, 20), (20, 20), (20, 20)), 2),
        (stages((19, 19), (19, 19), (19, 19)), None),
    ],
    ids=["first to second", "second to third", "the token", "nothing to do"],
)
def test_what_did_not_move_between_two_looks_is_stuck(after: list[Where], fault: int | None) -> None:
    found = stuck_at(after, after, KNOWN, patient=True)
    assert found is not None
    assert found[1] == fault


def test_nothing_is_stuck_while_anything_moves() -> None:
    assert stuck_at(stages((19, 19), (19, 19)), stages((20, 20), (19, 19)), KNOWN, patient=False) is None


def test_a_busy_stage_is_waited_for_but_not_for_ever() -> None:
    busy = stages((20, 20), (20, 19))
    assert stuck_at(busy, busy, KNOWN, patient=True) is None
    found = stuck_at(busy, busy, KNOWN, patient=False)
    assert found is not None
    assert found[1] == 1
