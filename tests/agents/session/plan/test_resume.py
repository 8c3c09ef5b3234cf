"""Resume points: which positions a stage computes again, and which kept outputs it sends without computing them again."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.agents.session.plan.resume import (
    KEPT,
    MIRROR,
    PREFILL,
    REPLAY,
    RecoveryRequest,
    ResumePoint,
    StageHeld,
    expected_held,
    method_of,
    resume_points,
)
from meshd.types import LayerRange, ModelId, PeerId, Plan, PlanId, StagePlan

A, B, C, D = (PeerId(name) for name in "abcd")


@st.composite
def situations(draw: st.DrawFn, longest: int = 40) -> tuple[list[StageHeld], int]:
    known = draw(st.integers(1, longest))
    position = st.integers(0, known + 2)  # a stage may have computed tokens that have not reached the coordinator
    held = []
    for _ in range(draw(st.integers(1, 5))):
        held_from, last = sorted((draw(position), draw(position)))
        held_from *= draw(st.booleans())
        held.append(StageHeld(last, draw(st.booleans()), *sorted((draw(position), draw(position))), held_from))
    return held, known


def sent(stage: StageHeld, point: ResumePoint, known: int) -> list[int] | None:
    """The positions whose outputs a stage sends, in order; None if it would have to send an output that it has not kept."""
    kept = range(point.send_from, point.start)
    if kept and not (stage.kept_from <= kept.start and kept.stop <= stage.kept_to):
        return None
    return [*kept, *(position for position in range(point.start, known) if position >= point.send_from)]


@settings(max_examples=500, deadline=None)
@given(situations())
def test_every_stage_gets_each_input_once_from_its_start_to_the_end(situation: tuple[list[StageHeld], int]) -> None:
    held, known = situation
    points = resume_points(held, known)
    assert len(points) == len(held)
    for stage, (point, next_point) in zip(held, pairwise(points), strict=False):
        assert sent(stage, point, known) == list(range(next_point.start, known))
    assert points[-1].send_from == known - 1
    assert sent(held[-1], points[-1], known) == [known - 1]


def startable(stage: StageHeld, known: int) -> list[int]:
    """The positions at which a stage can start."""
    return [0, *range(max(1, stage.held_from), min(stage.held, known - 1) + 1)]


@settings(max_examples=500, deadline=None)
@given(situations())
def test_no_stage_starts_past_its_kv_and_all_compute_the_last_token(situation: tuple[list[StageHeld], int]) -> None:
    held, known = situation
    for stage, point in zip(held, resume_points(held, known), strict=True):
        assert point.start in startable(stage, known)


@settings(max_examples=200, deadline=None)
@given(situations(longest=5))
def test_no_other_possible_choice_starts_any_stage_later(situation: tuple[list[StageHeld], int]) -> None:
    held, known = situation
    chosen = [point.start for point in resume_points(held, known)]
    for starts in product(*(startable(stage, known) for stage in held)):
        sends_from = [*starts[1:], known - 1]
        points = [ResumePoint(start, send_from) for start, send_from in zip(starts, sends_from, strict=True)]
        if all(sent(stage, point, known) is not None for stage, point in zip(held, points, strict=True)):
            assert all(start <= latest for start, latest in zip(starts, chosen, strict=True))


def starts(held: list[StageHeld], known: int) -> list[int]:
    return [point.start for point in resume_points(held, known)]


def method(held: list[StageHeld], known: int) -> str:
    return method_of(held, resume_points(held, known), known)


def survivor(known: int, *, kept: bool = True) -> StageHeld:
    return StageHeld(known - 1, kept_to=known - 1 if kept else 0)


def test_a_replacement_gets_its_input_from_the_outputs_that_the_previous_stage_kept() -> None:
    held = [survivor(100), StageHeld(0), survivor(100)]
    assert resume_points(held, 100) == (ResumePoint(99, 0), ResumePoint(0, 99), ResumePoint(99, 99))
    assert method(held, 100) == REPLAY


def test_without_kept_outputs_the_previous_stages_compute_again_too() -> None:
    held = [survivor(100), survivor(100, kept=False), StageHeld(0)]
    assert starts(held, 100) == [99, 0, 0]
    assert method(held, 100) == REPLAY
    assert starts([survivor(100, kept=False), survivor(100, kept=False), StageHeld(0)], 100) == [0, 0, 0]


def test_kept_outputs_without_their_beginning_or_end_are_used_as_far_as_possible() -> None:
    assert starts([StageHeld(99, kept_from=10, kept_to=99), StageHeld(0)], 100) == [0, 0]
    assert starts([StageHeld(99, kept_from=10, kept_to=99), StageHeld(20)], 100) == [99, 20]
    assert starts([StageHeld(99, kept_from=0, kept_to=60), StageHeld(20)], 100) == [60, 20]
    assert starts([StageHeld(99, kept_from=0, kept_to=10), StageHeld(20)], 100) == [20, 20]


def test_a_replaced_first_stage_needs_only_the_tokens() -> None:
    held = [StageHeld(0), survivor(100), survivor(100)]
    assert resume_points(held, 100)[0] == ResumePoint(0, 99)
    assert method(held, 100) == REPLAY


def test_the_method_is_the_most_expensive_one_that_a_stage_needs() -> None:
    assert method([survivor(100), survivor(100)], 100) == KEPT
    assert method([StageHeld(0), StageHeld(0)], 100) == PREFILL
    assert method([StageHeld(0)], 1) == PREFILL
    assert method([survivor(100), StageHeld(99, mirrored=True)], 100) == MIRROR
    assert method([survivor(100), StageHeld(80, mirrored=True)], 100) == MIRROR, (
        "the copy's last positions are computed from kept outputs"
    )
    assert method([survivor(100), StageHeld(0, mirrored=True)], 100) == REPLAY
    assert method([survivor(100), StageHeld(80, mirrored=True), StageHeld(0)], 100) == REPLAY
    assert method([StageHeld(50), StageHeld(0)], 100) == PREFILL, (
        "the second stage needs all outputs, and the first one has kept none"
    )


def test_reports_out_of_bounds_are_clipped_and_nothing_to_resume_is_an_error() -> None:
    assert starts([StageHeld(-5), StageHeld(10**9)], 100) == [0, 99]
    with pytest.raises(ValueError, match="cannot resume"):
        resume_points([], 3)
    with pytest.raises(ValueError, match="cannot resume"):
        resume_points([StageHeld(0)], 0)


def test_the_expected_reports_of_a_new_plans_stages() -> None:
    stages = tuple(StagePlan(peer=peer, layers=LayerRange(start, start + 10)) for peer, start in ((A, 0), (B, 10), (C, 20)))
    old = Plan(id=PlanId("1"), model=ModelId("m"), stages=stages, prefill_chunk_tokens=128, context=64)
    request = RecoveryRequest(
        old=old,
        lost=frozenset({B}),
        avoid=frozenset(),
        prompt_tokens=10,
        max_tokens=54,
        known=20,
        mirrors={0: (B, 19), 1: (D, 17), 2: (D, 12)},
    )
    assert request.copies == {1: (D, 17), 2: (D, 12)}
    new = [
        StagePlan(peer=A, layers=LayerRange(0, 10)),
        StagePlan(peer=D, layers=LayerRange(12, 20)),
        StagePlan(peer=C, layers=LayerRange(20, 25)),
        StagePlan(peer=A, layers=LayerRange(25, 30)),
    ]
    assert expected_held(request, new, {0, 2}) == (
        StageHeld(19, kept_to=19),
        StageHeld(17, mirrored=True),
        StageHeld(19),
        StageHeld(0),
    )
