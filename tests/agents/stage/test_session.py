"""The state machine of a stage: all transitions, order, repeats, credit, the prefill window, and resuming a later epoch."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.machine import IllegalTransition
from meshd.agents.stage import session as machine
from meshd.agents.stage.session import PREFILL_WINDOW, TRANSITIONS, StageSession, StageState, Step

PROMPT = 8
CAPACITY = PROMPT + 16


def prefill(position: int, *, tokens: int = 1, sample: bool = False) -> Step:
    return Step(position, tokens, sample, True)


def decode(position: int) -> Step:
    return Step(position, 1, True, False, index=position - PROMPT + 1)


def fresh(*, first: bool = True, last: bool = False, credit: int = 4) -> StageSession:
    return StageSession(known_tokens=PROMPT, max_tokens=CAPACITY, credit=credit, first=first, last=last)


def reopened(**changes: Any) -> StageSession:
    """Make a session in a later epoch, with KV and kept outputs of all known tokens but the last."""
    fields = {
        "held": PROMPT - 1,
        "kept_from": 0,
        "kept_to": PROMPT - 1,
        "chunk_tokens": 2,
        "first": False,
        "last": False,
        **changes,
    }
    return StageSession(known_tokens=PROMPT, max_tokens=CAPACITY, credit=4, state=StageState.OPEN, **fields)


def in_state(state: StageState) -> StageSession:
    session = reopened() if state is StageState.OPEN else fresh()
    if state is StageState.COMPUTING:
        session.handle(machine.StepArrived(prefill(0)))
    if state is StageState.WAITING:
        for position in range(PREFILL_WINDOW):
            session.handle(machine.StepArrived(prefill(position)))
            session.handle(machine.StepComputed(position, "out"))
        session.handle(machine.StepArrived(prefill(PREFILL_WINDOW)))
    if state is StageState.ENDED:
        session.handle(machine.StageEnded("closed"))
    assert session.state is state
    return session


EVENTS: dict[type, machine.Event] = {
    machine.StageResumed: machine.StageResumed(PROMPT - 1, PROMPT - 1),
    machine.StepTaken: machine.StepTaken(0),
    machine.CreditGranted: machine.CreditGranted(9),
    machine.StageEnded: machine.StageEnded("closed"),
}


@pytest.mark.parametrize("state", list(StageState))
@pytest.mark.parametrize("kind", [*EVENTS, machine.StepArrived, machine.StepComputed], ids=lambda k: k.__name__)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(state: StageState, kind: type) -> None:
    session = in_state(state)
    computing = session.computing.position if session.computing else 0
    arrived, computed = machine.StepArrived(prefill(session.next_position)), machine.StepComputed(computing, "out")
    event = {**EVENTS, machine.StepArrived: arrived, machine.StepComputed: computed}[kind]
    before = repr(session)
    if (state, kind) in TRANSITIONS:
        session.handle(event)
        session.validate()
    else:
        with pytest.raises(IllegalTransition):
            session.handle(event)
        assert repr(session) == before


def test_only_the_computing_step_can_be_reported_as_computed() -> None:
    session = in_state(StageState.COMPUTING)
    with pytest.raises(IllegalTransition, match="step 3 was reported as computed, but 0 is computing"):
        session.handle(machine.StepComputed(3, "out"))


def test_a_repeat_of_the_newest_step_is_answered_with_its_stored_output() -> None:
    session = fresh()
    session.handle(machine.StepArrived(prefill(0)))
    session.handle(machine.StepComputed(0, "out"))
    assert session.handle(machine.StepArrived(prefill(0))) == [machine.Deliver(prefill(0), "out")]


def test_a_repeat_of_the_computing_step_is_ignored() -> None:
    session = fresh()
    assert session.handle(machine.StepArrived(prefill(0))) == [machine.Compute(prefill(0))]
    assert session.handle(machine.StepArrived(prefill(0))) == []


@pytest.mark.parametrize(
    ("step", "message_part"),
    [
        (prefill(1), "step 1 came where 0"),
        (prefill(0, tokens=0), "past"),
        (prefill(0, tokens=9), "past the 8 known"),
        (Step(0, 25, False, False), "past the 24 reserved"),
        (prefill(0, tokens=4, sample=True), "requested at 4, where the token is already known"),
    ],
)
def test_a_step_that_can_not_be_next_is_rejected(step: Step, message_part: str) -> None:
    session = fresh()
    (rejected,) = session.handle(machine.StepArrived(step))
    assert isinstance(rejected, machine.RejectStep)
    assert message_part in rejected.reason
    assert session.next_position == 0


def test_prefill_waits_until_the_next_stage_has_taken_a_step() -> None:
    session = in_state(StageState.WAITING)
    assert session.handle(machine.StepTaken(0)) == [machine.Compute(prefill(PREFILL_WINDOW))]


def test_the_last_stage_has_no_prefill_window() -> None:
    session = fresh(first=False, last=True)
    for position in range(PREFILL_WINDOW + 2):
        session.handle(machine.StepArrived(prefill(position)))
        session.handle(machine.StepComputed(position, "out"))
    assert session.state is StageState.IDLE


def test_decoding_waits_for_credit_on_the_first_stage_only() -> None:
    for first in (True, False):
        session = fresh(first=first, last=not first, credit=1)
        for position in range(PROMPT):
            session.handle(machine.StepArrived(prefill(position)))
            session.handle(machine.StepComputed(position, "out"))
            session.handle(machine.StepTaken(position))
        commands = session.handle(machine.StepArrived(decode(PROMPT)))
        assert commands == ([] if first else [machine.Compute(decode(PROMPT))])
        if first:
            assert session.handle(machine.CreditGranted(2)) == [machine.Compute(decode(PROMPT))]


def test_a_hold_revokes_credit_until_the_next_grant() -> None:
    session = fresh(first=True, last=True, credit=64)
    for position in range(PROMPT):
        session.handle(machine.StepArrived(prefill(position)))
        session.handle(machine.StepComputed(position, "out"))
    session.handle(machine.CreditGranted(1, hold=True))
    assert session.handle(machine.StepArrived(decode(PROMPT))) == []
    assert session.state is StageState.WAITING
    assert session.handle(machine.CreditGranted(64)) == [machine.Compute(decode(PROMPT))]


def test_kv_is_freed_only_when_no_step_computes_on_it() -> None:
    session = in_state(StageState.COMPUTING)
    assert session.handle(machine.StageEnded("closed")) == []
    assert session.handle(machine.StepComputed(0, "out")) == [machine.FreeKv("closed")]
    assert in_state(StageState.IDLE).handle(machine.StageEnded("closed")) == [machine.FreeKv("closed")]


def test_with_kv_of_all_older_tokens_only_the_newest_is_computed() -> None:
    session = reopened()
    assert session.handle(machine.StageResumed(7, 7)) == [machine.BeginAt(7)]
    assert session.handle(machine.StepArrived(prefill(7, sample=True))) == [machine.Compute(prefill(7, sample=True))]


def test_kept_outputs_are_sent_in_chunks_within_the_window_before_the_first_step() -> None:
    session = reopened(kept_to=7)
    session.chunk_tokens = 1
    commands = session.handle(machine.StageResumed(7, 1))
    assert commands == [machine.BeginAt(7), *(machine.Replay(position, 1) for position in (1, 2, 3, 4))]
    assert session.handle(machine.StepArrived(prefill(7, sample=True))) == []
    session.validate()
    assert session.handle(machine.StepTaken(1)) == [machine.Replay(5, 1)]
    assert session.handle(machine.StepTaken(3)) == [machine.Replay(6, 1), machine.Compute(prefill(7, sample=True))]


def test_the_last_chunk_of_a_replay_ends_where_computing_starts() -> None:
    assert reopened().handle(machine.StageResumed(7, 2)) == [
        machine.BeginAt(7),
        machine.Replay(2, 2),
        machine.Replay(4, 2),
        machine.Replay(6, 1),
    ]


def test_outputs_that_the_next_stage_has_are_computed_but_not_sent() -> None:
    session = reopened()
    session.handle(machine.StageResumed(0, 5))
    for step, sent in ((prefill(0, tokens=4), None), (prefill(4, tokens=3), 1), (prefill(7, sample=True), 0)):
        session.handle(machine.StepArrived(step))
        commands = session.handle(machine.StepComputed(step.position, "out"))
        assert commands == ([] if sent is None else [machine.Deliver(step, "out", sent)])
    assert session.untaken == {5, 7}
    session.handle(machine.StepTaken(5))
    assert session.untaken == {7}


def test_the_last_stage_samples_whatever_send_from_is() -> None:
    session = reopened(last=True)
    session.handle(machine.StageResumed(6, 7))
    session.handle(machine.StepArrived(prefill(6, tokens=2, sample=True)))
    step = prefill(6, tokens=2, sample=True)
    assert session.handle(machine.StepComputed(6, "out")) == [machine.Deliver(step, "out", 0)]


@pytest.mark.parametrize(
    ("changes", "start", "send_from", "message_part"),
    [
        ({}, 8, 7, "can't start at 8"),
        ({}, -1, 0, "can't start at -1"),
        ({"held": 20}, 8, 7, "8 tokens are known"),
        ({}, 7, 8, "send from 8"),
        ({}, 7, -1, "send from -1"),
        ({"kept_from": 3}, 7, 2, "not those from 2 to 7"),
        ({"kept_to": 6}, 7, 2, "not those from 2 to 7"),
    ],
)
def test_an_impossible_resume_is_refused(changes: dict[str, int], start: int, send_from: int, message_part: str) -> None:
    (refused,) = reopened(**changes).handle(machine.StageResumed(start, send_from))
    assert isinstance(refused, machine.RefuseResume)
    assert message_part in refused.reason


def test_steps_that_arrive_before_resume_wait_for_it_up_to_a_limit() -> None:
    session = reopened(held=3)
    for position in range(3, 3 + PREFILL_WINDOW):
        assert session.handle(machine.StepArrived(prefill(position))) == []
    (rejected,) = session.handle(machine.StepArrived(prefill(7)))
    assert isinstance(rejected, machine.RejectStep)
    session.validate()
    assert session.handle(machine.StageResumed(3, 3)) == [machine.BeginAt(3), machine.Compute(prefill(3))]
    assert [step.position for step in session.inbox] == [4, 5, 6]


def test_an_early_step_that_is_not_at_the_start_is_rejected_at_resume() -> None:
    session = reopened()
    session.handle(machine.StepArrived(prefill(5)))
    begun, rejected = session.handle(machine.StageResumed(3, 3))
    assert begun == machine.BeginAt(3)
    assert isinstance(rejected, machine.RejectStep)


def test_a_second_resume_changes_nothing() -> None:
    session = reopened()
    session.handle(machine.StageResumed(7, 7))
    assert session.handle(machine.StageResumed(0, 0)) == []
    assert session.next_position == 7


ACTIONS = ["next", "repeat", "compute", "take", "credit", "end", "resume"]


@given(st.lists(st.sampled_from(ACTIONS), max_size=80), st.booleans(), st.none() | st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_steps_are_computed_once_and_in_order_and_kv_is_freed_once(
    actions: list[str], last: bool, resumed: tuple[int, int] | None
) -> None:
    session = fresh(last=last) if resumed is None else reopened(last=last)
    start, send_from = resumed or (0, 0)
    computed: list[int] = []
    sent: list[tuple[int, int]] = []
    freed = 0
    for action in actions:
        position = session.next_position
        step = prefill(position) if position < PROMPT else decode(position)
        idle = session.computing is None and not session.inbox  # a decode step needs the token of the step before it
        event: machine.Event
        if action == "next" and (position < PROMPT or (idle and position < CAPACITY)) and session.state is not StageState.OPEN:
            event = machine.StepArrived(step)
        elif action == "repeat" and position > start:
            event = machine.StepArrived(prefill(position - 1) if position <= PROMPT else decode(position - 1))
        elif action == "compute" and session.computing is not None:
            event = machine.StepComputed(session.computing.position, "out")
        elif action == "take":
            event = machine.StepTaken(min(session.untaken, default=0))
        elif action == "credit":
            event = machine.CreditGranted(session.credit + 1)
        elif action == "end":
            event = machine.StageEnded("closed")
        elif action == "resume" and resumed is not None:
            event = machine.StageResumed(start, send_from)
        else:
            continue
        for command in session.handle(event):
            assert not isinstance(command, machine.RejectStep | machine.RefuseResume)
            if isinstance(command, machine.Compute):
                computed.append(command.step.position)
            if isinstance(command, machine.Replay):
                sent.append((command.position, command.position + command.tokens))
            if isinstance(command, machine.Deliver) and action != "repeat":
                sent.append((command.step.position + command.skip, command.step.end))
            freed += isinstance(command, machine.FreeKv)
        session.validate()
    assert computed == list(range(start, start + len(computed)))
    assert freed == (session.state is StageState.ENDED and session.computing is None)
    if not last and sent:
        assert sent[0][0] == max(send_from, 0)
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(sent)), "a gap, or sent twice"
