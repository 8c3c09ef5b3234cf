"""Where a session is stuck, from two looks at its stages."""

import pytest

from meshd.agents.session.stages.stall import StageWhereabouts, stuck_at

KNOWN = 20
"""Tokens of prompt and answer that the coordinator has: position 19 is being computed."""


def stages(*pairs: tuple[int, int]) -> list[StageWhereabouts]:
    return [StageWhereabouts(due, sent, 0.0) for due, sent in pairs]


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
def test_what_did_not_move_between_two_looks_is_stuck(after: list[StageWhereabouts], fault: int | None) -> None:
    found = stuck_at(after, after, KNOWN, limit_s=3.0)
    assert found is not None
    assert found[1] == fault


def test_nothing_is_stuck_while_anything_moves() -> None:
    assert stuck_at(stages((19, 19), (19, 19)), stages((20, 20), (19, 19)), KNOWN, limit_s=0.0) is None


def test_a_stage_that_waits_its_turn_is_waited_for_but_not_a_peer_that_computes_one_step_without_end() -> None:
    def found(computing_s: float, limit_s: float = 3.0) -> tuple[str, int | None] | None:
        busy = [StageWhereabouts(20, 20, 0.0), StageWhereabouts(20, 19, computing_s)]
        return stuck_at(busy, busy, KNOWN, limit_s=limit_s)

    assert found(0.5) is None
    for stuck in (found(3.5), found(0.5, limit_s=0.0)):
        assert stuck is not None
        assert stuck[1] == 1
