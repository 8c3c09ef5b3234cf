"""Stalls: where a session is stuck, from two reports of its stages."""

import pytest

from meshd.agents.session.stages.stall import StageWhereabouts, stuck_at

KNOWN = 20
"""Number of tokens of prompt and answer that the coordinator has: position 19 is being computed."""


def stages(*pairs: tuple[int, int]) -> list[StageWhereabouts]:
    return [StageWhereabouts(due, sent, 0.0) for due, sent in pairs]


@pytest.mark.parametrize(
    ("after", "at_fault"),
    [
        (stages((20, 20), (19, 19), (19, 19)), 1),
        (stages((20, 20), (20, 20), (19, 19)), 2),
        (stages((20, 20), (20, 20), (20, 20)), 2),
        (stages((19, 19), (19, 19), (19, 19)), None),
    ],
    ids=["first to second", "second to third", "the token", "nothing to do"],
)
def test_the_stage_that_lacks_its_input_or_whose_output_is_lost_is_at_fault(
    after: list[StageWhereabouts], at_fault: int | None
) -> None:
    found = stuck_at(after, after, KNOWN, limit_s=3.0)
    assert found is not None
    assert found[1] == at_fault


def test_nothing_is_stuck_while_any_stage_moves() -> None:
    assert stuck_at(stages((19, 19), (19, 19)), stages((20, 20), (19, 19)), KNOWN, limit_s=0.0) is None


def test_a_busy_stage_is_stuck_only_when_its_peer_computes_one_step_for_too_long() -> None:
    def found(computing_s: float, limit_s: float = 3.0) -> tuple[str, int | None] | None:
        busy = [StageWhereabouts(20, 20, 0.0), StageWhereabouts(20, 19, computing_s)]
        return stuck_at(busy, busy, KNOWN, limit_s=limit_s)

    assert found(0.5) is None
    for stuck in (found(3.5), found(0.5, limit_s=0.0)):
        assert stuck is not None
        assert stuck[1] == 1
