"""Where stages go on: what is computed again and what is only sent."""

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
    resume_positions,
)
from meshd.types import LayerRange, ModelId, PeerId, Plan, PlanId, StagePlan

A, B, C, D = (PeerId(name) for name in "abcd")


@st.composite
def situations(draw: st.DrawFn, longest: int = 40) -> tuple[list[StageHeld], int]:
    known = draw(st.integers(1, longest))
    position = st.integers(0, known + 2)  # a stage may have gone on past what the coordinator has heard of
    held = [
        StageHeld(draw(position), draw(st.booleans()), *sorted((draw(position), draw(position))))
        for _ in range(draw(st.integers(1, 5)))
    ]
    return held, known


def sent(have: StageHeld, resumption: ResumePoint, known: int) -> list[int] | None:
    """The positions that a stage sends on, in order; None if it would have to send what it does not have."""
    from_log = range(resumption.send_from, resumption.start)
    if from_log and not (have.kept_from <= from_log.start and from_log.stop <= have.kept_to):
        return None
    return [*from_log, *(position for position in range(resumption.start, known) if position >= resumption.send_from)]


@settings(max_examples=500, deadline=None)
@given(situations())
def test_every_stage_gets_each_input_once_from_its_start_to_the_end(situation: tuple[list[StageHeld], int]) -> None:
    held, known = situation
    resumptions = resume_positions(held, known)
    assert len(resumptions) == len(held)
    for have, (one, other) in zip(held, pairwise(resumptions), strict=False):
        assert sent(have, one, known) == list(range(other.start, known))
    assert resumptions[-1].send_from == known - 1
    assert sent(held[-1], resumptions[-1], known) == [known - 1]


@settings(max_examples=500, deadline=None)
@given(situations())
def test_no_stage_starts_past_its_kv_and_all_compute_the_last_token(situation: tuple[list[StageHeld], int]) -> None:
    held, known = situation
    for have, resumption in zip(held, resume_positions(held, known), strict=True):
        assert 0 <= resumption.start <= min(have.held, known - 1)


@settings(max_examples=200, deadline=None)
@given(situations(longest=5))
def test_nothing_is_computed_that_any_other_choice_would_spare(situation: tuple[list[StageHeld], int]) -> None:
    held, known = situation
    least = [resumption.start for resumption in resume_positions(held, known)]
    for starts in product(*(range(min(have.held, known - 1) + 1) for have in held)):
        wanted = [*starts[1:], known - 1]
        choice = [ResumePoint(start, send_from) for start, send_from in zip(starts, wanted, strict=True)]
        if all(sent(have, each, known) is not None for have, each in zip(held, choice, strict=True)):
            assert all(start <= latest for start, latest in zip(starts, least, strict=True))


def starts(held: list[StageHeld], known: int) -> list[int]:
    return [resumption.start for resumption in resume_positions(held, known)]


def method(held: list[StageHeld], known: int) -> str:
    return method_of(held, resume_positions(held, known), known)


def survivor(known: int, *, kept: bool = True) -> StageHeld:
    return StageHeld(known - 1, kept_to=known - 1 if kept else 0)


def test_a_replacement_is_fed_from_what_the_stage_before_it_kept() -> None:
    held = [survivor(100), StageHeld(0), survivor(100)]
    assert resume_positions(held, 100) == (ResumePoint(99, 0), ResumePoint(0, 99), ResumePoint(99, 99))
    assert method(held, 100) == REPLAY


def test_without_kept_outputs_the_stages_before_compute_again_too() -> None:
    held = [survivor(100), survivor(100, kept=False), StageHeld(0)]
    assert starts(held, 100) == [99, 0, 0]
    assert method(held, 100) == REPLAY
    assert starts([survivor(100, kept=False), survivor(100, kept=False), StageHeld(0)], 100) == [0, 0, 0]


def test_kept_outputs_that_lost_their_beginning_or_their_end() -> None:
    assert starts([StageHeld(99, kept_from=10, kept_to=99), StageHeld(0)], 100) == [0, 0]
    assert starts([StageHeld(99, kept_from=10, kept_to=99), StageHeld(20)], 100) == [99, 20]
    assert starts([StageHeld(99, kept_from=0, kept_to=60), StageHeld(20)], 100) == [60, 20]
    assert starts([StageHeld(99, kept_from=0, kept_to=10), StageHeld(20)], 100) == [20, 20]


def test_the_first_stage_is_replaced_from_the_tokens_alone() -> None:
    held = [StageHeld(0), survivor(100), survivor(100)]
    assert resume_positions(held, 100)[0] == ResumePoint(0, 99)
    assert method(held, 100) == REPLAY


def test_methods() -> None:
    assert method([survivor(100), survivor(100)], 100) == KEPT
    assert method([StageHeld(0), StageHeld(0)], 100) == PREFILL
    assert method([StageHeld(0)], 1) == PREFILL
    assert method([survivor(100), StageHeld(99, mirrored=True)], 100) == MIRROR
    assert method([survivor(100), StageHeld(80, mirrored=True)], 100) == MIRROR, (
        "the copy's last positions are computed from kept outputs"
    )
    assert method([survivor(100), StageHeld(0, mirrored=True)], 100) == REPLAY
    assert method([survivor(100), StageHeld(80, mirrored=True), StageHeld(0)], 100) == REPLAY
    assert method([StageHeld(50), StageHeld(0)], 100) == PREFILL, "what is held is of no use without kept outputs"


def test_what_peers_tell_is_taken_with_care() -> None:
    assert starts([StageHeld(-5), StageHeld(10**9)], 100) == [0, 99]
    with pytest.raises(ValueError, match="nothing to go on with"):
        resume_positions([], 3)
    with pytest.raises(ValueError, match="nothing to go on with"):
        resume_positions([StageHeld(0)], 0)


def test_what_a_new_plan_is_expected_to_find() -> None:
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
