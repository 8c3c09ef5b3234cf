"""A stage's machine: every transition walked; order, repeats, credit and windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents import stage_session as machine
from meshd.agents.stage_session import PREFILL_WINDOW, TRANSITIONS, IllegalTransition, StageSession, State, Step

PROMPT = 8


def prefill(number: int, *, sample: bool = False) -> Step:
    return Step(number, number, 1, sample, True)


def decode(number: int) -> Step:
    return Step(number, number, 1, True, False, index=number - PROMPT + 1)


def fresh(*, first: bool = True, last: bool = False, credit: int = 4) -> StageSession:
    return StageSession(prompt_tokens=PROMPT, max_tokens=16, credit=credit, first=first, last=last)


def in_state(state: State) -> StageSession:
    session = fresh()
    if state is State.COMPUTING:
        session.handle(machine.StepArrived(prefill(0)))
    if state is State.WAITING:
        for number in range(PREFILL_WINDOW):
            session.handle(machine.StepArrived(prefill(number)))
            session.handle(machine.StepComputed(number, "out"))
        session.handle(machine.StepArrived(prefill(PREFILL_WINDOW)))
    if state is State.ENDED:
        session.handle(machine.Ended("closed"))
    assert session.state is state
    return session


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize(
    "kind",
    [machine.StepArrived, machine.StepComputed, machine.StepTaken, machine.CreditGranted, machine.Ended],
    ids=lambda k: k.__name__,
)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(state: State, kind: type) -> None:
    session = in_state(state)
    computing = session.computing.number if session.computing else 0
    event: machine.Event = {
        machine.StepArrived: machine.StepArrived(prefill(session.next_number)),
        machine.StepComputed: machine.StepComputed(computing, "out"),
        machine.StepTaken: machine.StepTaken(0),
        machine.CreditGranted: machine.CreditGranted(9),
        machine.Ended: machine.Ended("closed"),
    }[kind]
    before = repr(session)
    if (state, kind) in TRANSITIONS:
        session.handle(event)
        session.validate()
    else:
        with pytest.raises(IllegalTransition):
            session.handle(event)
        assert repr(session) == before


def test_a_repeat_of_the_newest_step_is_answered_from_what_is_there() -> None:
    session = fresh()
    session.handle(machine.StepArrived(prefill(0)))
    session.handle(machine.StepComputed(0, "out"))
    assert session.handle(machine.StepArrived(prefill(0))) == [machine.Deliver(prefill(0), "out")]


def test_a_repeat_of_a_step_under_way_is_computed_once() -> None:
    session = fresh()
    assert session.handle(machine.StepArrived(prefill(0))) == [machine.Compute(prefill(0))]
    assert session.handle(machine.StepArrived(prefill(0))) == []


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (prefill(1), "step 1"),
        (Step(0, 3, 1, False, True), "position 3"),
        (Step(0, 0, 0, False, True), "past"),
        (Step(0, 0, 25, False, True), "past the 24 reserved"),
    ],
)
def test_a_step_that_can_not_be_next_is_rejected(step: Step, told: str) -> None:
    session = fresh()
    (rejected,) = session.handle(machine.StepArrived(step))
    assert isinstance(rejected, machine.Reject)
    assert told in rejected.reason
    assert session.next_number == 0


def test_prefill_waits_until_the_next_stage_has_taken_a_step() -> None:
    session = in_state(State.WAITING)
    assert session.handle(machine.StepTaken(0)) == [machine.Compute(prefill(PREFILL_WINDOW))]


def test_the_last_stage_does_not_wait_for_a_next_one() -> None:
    session = fresh(first=False, last=True)
    for number in range(PREFILL_WINDOW + 2):
        session.handle(machine.StepArrived(prefill(number)))
        session.handle(machine.StepComputed(number, "out"))
    assert session.state is State.IDLE


def test_decoding_waits_for_credit_on_the_first_stage_only() -> None:
    for first in (True, False):
        session = fresh(first=first, last=not first, credit=1)
        for number in range(PROMPT):
            session.handle(machine.StepArrived(prefill(number)))
            session.handle(machine.StepComputed(number, "out"))
            session.handle(machine.StepTaken(number))
        commands = session.handle(machine.StepArrived(decode(PROMPT)))
        assert commands == ([] if first else [machine.Compute(decode(PROMPT))])
        if first:
            assert session.handle(machine.CreditGranted(2)) == [machine.Compute(decode(PROMPT))]


def test_memory_is_freed_only_when_nothing_computes_on_it() -> None:
    session = in_state(State.COMPUTING)
    assert session.handle(machine.Ended("closed")) == []
    assert session.handle(machine.StepComputed(0, "out")) == [machine.Free("closed")]
    assert in_state(State.IDLE).handle(machine.Ended("closed")) == [machine.Free("closed")]


@given(st.lists(st.sampled_from(["next", "repeat", "compute", "take", "credit", "end"]), max_size=80), st.booleans())
def test_steps_are_computed_once_and_in_order_and_memory_is_freed_once(actions: list[str], last: bool) -> None:
    session = fresh(last=last)
    computed: list[int] = []
    freed = 0
    for action in actions:
        number = session.next_number
        step = prefill(number) if number < PROMPT else decode(number)
        event: machine.Event
        if action == "next" and number < PROMPT + 16:
            event = machine.StepArrived(step)
        elif action == "repeat" and number > 0:
            event = machine.StepArrived(prefill(number - 1) if number <= PROMPT else decode(number - 1))
        elif action == "compute" and session.computing is not None:
            event = machine.StepComputed(session.computing.number, "out")
        elif action == "take":
            event = machine.StepTaken(max(session.untaken, default=0))
        elif action == "credit":
            event = machine.CreditGranted(session.credit + 1)
        elif action == "end":
            event = machine.Ended("closed")
        else:
            continue
        for command in session.handle(event):
            if isinstance(command, machine.Compute):
                computed.append(command.step.number)
            freed += isinstance(command, machine.Free)
        session.validate()
    assert computed == list(range(len(computed)))
    assert freed == (session.state is State.ENDED and session.computing is None)
