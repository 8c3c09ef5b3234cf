"""Predicted pauses of a session whose plan changes."""

import pytest

from in_process.clusters import make_holding, make_network, make_peer, make_problem
from meshd.planner.model.estimate import estimate
from meshd.planner.problem import PlanInput
from meshd.planner.session.pause import compute_s, pause_s
from meshd.types import LayerRange, PeerId, StagePlan

A, B, C = (make_peer(name, holdings=(make_holding(0, 30),)) for name in "abc")


def stages(text: str) -> tuple[StagePlan, ...]:
    parts = (part.split(":") for part in text.split(","))
    return tuple(StagePlan(peer=PeerId(f"{name}-id"), layers=LayerRange.parse(layers)) for name, layers in parts)


def problem_of(*peers: object, known: int = 300, **fields: object) -> PlanInput:
    return make_problem(*peers, prompt_tokens=known, resident_only=True, **fields)  # type: ignore[arg-type]


def test_the_time_of_a_range_is_the_sum_of_its_chunks() -> None:
    problem = problem_of(A)
    whole = compute_s(problem, A, 0, 384)
    parts = sum(compute_s(problem, A, first, first + 128) for first in (0, 128, 256))
    assert whole == pytest.approx(parts)
    assert compute_s(problem, A, 128, 384).sum() < whole.sum()
    assert compute_s(problem, A, 10, 10).sum() == 0


def test_a_single_position_takes_a_decode_step() -> None:
    problem = problem_of(A, context=599)
    predicted = estimate(problem_of(A, known=599, context=599), stages("a:0-30")).stages[0]
    assert compute_s(problem, A, 598, 599).sum() == pytest.approx(predicted.decode_s - predicted.head_s - predicted.overhead_s)


def test_recomputing_everything_takes_the_time_to_first_token() -> None:
    problem = problem_of(A, known=384)
    assert pause_s(problem, stages("a:0-30"), [0], 384, A.id) == pytest.approx(estimate(problem, stages("a:0-30")).ttft_s)
    split = stages("a:0-15,b:15-30")
    two = problem_of(A, B, known=384)
    opening = pause_s(two, split, [383, 383], 384, A.id)
    assert estimate(two, split).ttft_s == pytest.approx(pause_s(two, split, [0, 0], 384, A.id), abs=opening)


def test_the_pause_is_shorter_if_less_is_recomputed() -> None:
    problem = problem_of(A, B, C)
    three = stages("a:0-10,b:10-20,c:20-30")
    pauses = [pause_s(problem, three, starts, 300, A.id) for starts in ([299, 299, 299], [299, 250, 299], [299, 0, 299], [0, 0, 0])]
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[2] / 5


def test_the_pause_includes_sending_cached_outputs() -> None:
    slow = problem_of(A, B, network=make_network([A, B], bandwidth=1e6))
    two = stages("a:0-15,b:15-30")
    pause = pause_s(slow, two, [299, 0], 300, A.id)
    assert pause > 300 * slow.activation_bytes / 1e6
