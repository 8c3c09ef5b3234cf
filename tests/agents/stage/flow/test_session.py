"""The state machine of a stage: all transitions, the order of steps, repeats, credit, slices, refills, and a later epoch."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from meshd.agents.machine import IllegalTransition
from meshd.agents.stage.flow import events as fsm
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.flow.session import TRANSITIONS, StageSession, StageState
from meshd.protocol.messages import STEP_WINDOW, StepKind

PROMPT = 8
RESERVED = PROMPT + 16


def chunk(seq: int, start: int, tokens: int = 1, **changes: Any) -> StageStep:
    """Make a prefill step."""
    end = start + tokens
    return replace(StageStep(start, tokens, StepKind.PREFILL, int(end == PROMPT), end, seq), **changes)


def decode(seq: int, start: int, **changes: Any) -> StageStep:
    return replace(StageStep(start, 1, StepKind.DECODE, 1, start + 1, seq), **changes)


def refill(seq: int, start: int, tokens: int) -> StageStep:
    return StageStep(start, tokens, StepKind.REFILL, seq=seq)


def fresh(*, first: bool = False, last: bool = False, credit: int = 99) -> StageSession:
    return StageSession(
        prompt_tokens=PROMPT, known_tokens=PROMPT, max_tokens=RESERVED, token_credit=credit, first=first, last=last, chunk_tokens=2
    )


def reopened(**changes: Any) -> StageSession:
    """Make a session in a later epoch, with KV and kept outputs of all known tokens but the last."""
    session = fresh()
    fields = {"state": StageState.OPEN, "held": PROMPT - 1, "kept_from": 0, "kept_to": PROMPT - 1, **changes}
    for name, value in fields.items():
        setattr(session, name, value)
    return session


def handle(session: StageSession, *events: fsm.Event) -> list[fsm.Command]:
    """Pass events to the session, check its invariants after each. Returns: all commands."""
    commands: list[fsm.Command] = []
    for event in events:
        commands += session.handle(event)
        session.validate()
    return commands


def arrive(session: StageSession, *steps: StageStep) -> list[fsm.Command]:
    return handle(session, *(fsm.StepArrived(step) for step in steps))


def compute(session: StageSession, *tokens: int) -> list[fsm.Command]:
    """Begin and compute the ready step. Returns: all commands but ACK."""
    assert session.ready is not None
    commands = handle(session, fsm.StepBegun(session.ready.tokens), fsm.StepComputed("rows", tokens))
    return [command for command in commands if not isinstance(command, fsm.Acknowledge)]


def prefilled(**fields: Any) -> StageSession:
    """Make a session that has computed its prompt; the last stage has sampled token 100."""
    session = fresh(**fields)
    arrive(session, chunk(0, 0, PROMPT))
    compute(session, *([100] if session.last else []))
    handle(session, *([] if session.last else [fsm.OutputAcknowledged(1, 1 + STEP_WINDOW)]))
    return session


def in_state(state: StageState) -> StageSession:
    session = reopened() if state is StageState.OPEN else fresh()
    if state in (StageState.READY, StageState.COMPUTING):
        arrive(session, chunk(0, 0))
    if state is StageState.COMPUTING:
        handle(session, fsm.StepBegun(1))
    if state is StageState.WAITING:
        for position in range(STEP_WINDOW):
            arrive(session, chunk(position, position))
            compute(session)
        arrive(session, chunk(STEP_WINDOW, STEP_WINDOW))
    if state is StageState.ENDED:
        handle(session, fsm.StageEnded("closed"))
    assert session.state is state
    return session


EVENTS: dict[type, fsm.Event] = {
    fsm.StageResumed: fsm.StageResumed(PROMPT - 1, PROMPT - 1),
    fsm.TokensArrived: fsm.TokensArrived(0, (5,), (6,)),
    fsm.TokensGuessed: fsm.TokensGuessed((5,)),
    fsm.StepBegun: fsm.StepBegun(1),
    fsm.StepComputed: fsm.StepComputed("rows"),
    fsm.OutputAcknowledged: fsm.OutputAcknowledged(1, 1 + STEP_WINDOW),
    fsm.TokensGranted: fsm.TokensGranted(1),
    fsm.StageEnded: fsm.StageEnded("closed"),
}


@pytest.mark.parametrize("state", list(StageState))
@pytest.mark.parametrize("kind", [*EVENTS, fsm.StepArrived], ids=lambda kind: kind.__name__)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(state: StageState, kind: type) -> None:
    session = in_state(state)
    event = EVENTS.get(kind) or fsm.StepArrived(chunk(session.input.next_seq, session.due))
    before = repr(session)
    if (state, kind) in TRANSITIONS:
        handle(session, event)
    else:
        with pytest.raises(IllegalTransition):
            session.handle(event)
        assert repr(session) == before


@pytest.mark.parametrize("arrival", list(permutations(range(STEP_WINDOW))))
def test_steps_are_computed_in_the_order_of_their_numbers_in_whatever_order_they_arrive(arrival: tuple[int, ...]) -> None:
    session = fresh()
    for number, seq in enumerate(arrival):
        assert arrive(session, chunk(seq, 2 * seq, 2)) == []
        missing = min(set(range(STEP_WINDOW + 1)).difference(arrival[: number + 1]))
        assert session.due == 2 * missing
    sent = [compute(session)[0] for _ in arrival]
    assert [(command.sent.seq, command.sent.step.start) for command in sent if isinstance(command, fsm.Deliver)] == [
        (0, 0),
        (1, 2),
        (2, 4),
        (3, 6),
    ]


@pytest.mark.parametrize("state", [StageState.READY, StageState.COMPUTING, StageState.WAITING, StageState.IDLE])
def test_a_repeat_changes_nothing_and_is_answered_with_ack(state: StageState) -> None:
    session = in_state(state) if state is not StageState.IDLE else prefilled()
    before = repr(session)
    acknowledge = fsm.Acknowledge(session.input.next_seq, session.input.begun + STEP_WINDOW)
    for seq in range(session.input.next_seq):
        assert arrive(session, chunk(seq, 0)) == [acknowledge]
    assert repr(session) == before


def test_a_repeat_of_an_early_step_is_answered_with_ack() -> None:
    session = fresh()
    arrive(session, chunk(2, 4, 2))
    assert arrive(session, chunk(2, 4, 2)) == [fsm.Acknowledge(0, STEP_WINDOW)]


def test_prefill_steps_are_acknowledged_when_they_begin_and_decode_steps_are_not() -> None:
    session = fresh()
    arrive(session, chunk(0, 0, 7), chunk(1, 7))
    assert handle(session, fsm.StepBegun(7)) == [fsm.Acknowledge(2, 1 + STEP_WINDOW)]
    handle(session, fsm.StepComputed("rows"))
    compute(session)
    arrive(session, decode(2, 8))
    assert handle(session, fsm.StepBegun(1)) == []
    handle(session, fsm.StepComputed("rows"))
    assert arrive(session, decode(2, 8)) == [fsm.Acknowledge(3, 3 + STEP_WINDOW)], "but their room counts"


def test_a_step_without_credit_is_rejected() -> None:
    (rejected,) = arrive(fresh(), chunk(STEP_WINDOW, 0))
    assert isinstance(rejected, fsm.RejectStep)
    assert "came without credit: 4 were allowed" in rejected.reason


def test_a_step_waits_for_credit_of_the_next_stage() -> None:
    session = in_state(StageState.WAITING)
    assert not session.output.open
    handle(session, fsm.OutputAcknowledged(1, 1 + STEP_WINDOW))
    assert session.ready == chunk(STEP_WINDOW, STEP_WINDOW)


def test_decode_steps_acknowledge_each_other_so_that_no_ack_is_needed() -> None:
    session = fresh()
    arrive(session, chunk(0, 0, PROMPT))
    compute(session)
    for number in range(3 * STEP_WINDOW):
        assert arrive(session, decode(1 + number, PROMPT + number)) == []
        assert not session.output.waiting
        compute(session)
    assert session.output.next_seq == 1 + 3 * STEP_WINDOW


@pytest.mark.parametrize(
    ("step", "message_part"),
    [
        (chunk(0, 1), "a step at 1 came where one from 0 to 0 was due"),
        (chunk(0, 0, 0), "0 tokens at 0"),
        (chunk(0, 0, RESERVED + 1), "past the 24 reserved"),
        (chunk(0, 0, 9), "past the 8 known"),
        (chunk(0, 0, 4, sample=1), "samples 1"),
        (chunk(0, 0, 8, sample=0), "samples 0"),
        (chunk(0, 0, 4, committed=3), "commits 3"),
        (decode(0, 0), "samples 1"),
        (refill(0, 0, 1), "not of positions that were computed"),
    ],
)
def test_a_first_step_that_breaks_a_rule_is_rejected(step: StageStep, message_part: str) -> None:
    session = fresh()
    (rejected,) = arrive(session, step)
    assert isinstance(rejected, fsm.RejectStep)
    assert rejected.step == step
    assert message_part in rejected.reason
    assert session.due == 0


@pytest.mark.parametrize(
    ("step", "message_part"),
    [
        (decode(1, 7), "a step at 7 came where one from 8 to 8 was due"),
        (decode(1, 9), "a step at 9 came where one from 8 to 8 was due"),
        (decode(1, 8, sample=0), "samples 0"),
        (decode(1, 8, committed=8), "commits 8"),
        (decode(1, 8, committed=10), "commits 10"),
        (decode(1, 8, tokens=2, sample=2, committed=10), "a decode step of 2 tokens"),
        (decode(1, 8, ids=(1, 2, 3)), "ids"),
        (chunk(1, 8), "past the 8 known"),
        (refill(1, 6, 3), "a refill of 6 to 8"),
        (refill(1, 2, 0), "0 tokens at 2"),
    ],
)
def test_a_later_step_that_breaks_a_rule_is_rejected(step: StageStep, message_part: str) -> None:
    for session in (prefilled(), prefilled(last=True)):
        (rejected,) = arrive(session, step)
        assert isinstance(rejected, fsm.RejectStep)
        assert message_part in rejected.reason


def test_a_step_takes_positions_back_but_not_what_is_committed() -> None:
    session = fresh()
    arrive(session, chunk(0, 0, 6), chunk(1, 5, 2))
    assert session.due == 6, "position 5 is committed: the second step was rejected"
    session = prefilled()
    guess = {"kind": StepKind.VERIFY, "tokens": 3, "sample": 3}
    arrive(session, decode(1, 8, ids=(1, 2, 3), **guess, committed=9))
    compute(session)
    arrive(session, decode(2, 10))
    assert session.due == 11
    assert handle(session, fsm.StepBegun(1)) == [fsm.Truncate(10)], "its output of position 10 is dropped"
    assert (session.computed, session.committed) == (11, 11)


def test_the_first_stage_cuts_a_prompt_as_the_scheduler_says() -> None:
    session = fresh(first=True)
    prompt = chunk(0, 0, PROMPT, data="all ids")
    arrive(session, prompt)
    slices = []
    for tokens in (3, 4, 1):
        commands = handle(session, fsm.StepBegun(tokens))
        begun = session.computing
        assert begun is not None
        slices.append((begun.start, begun.tokens, begun.sample, begun.committed, begun.data))
        assert commands == ([fsm.Acknowledge(1, 1 + STEP_WINDOW)] if tokens == 1 else []), "its room is free with its last slice"
        handle(session, fsm.StepComputed("rows"))
    assert slices == [(0, 3, 0, 3, "all ids"), (3, 4, 0, 7, "all ids"), (7, 1, 1, 8, "all ids")]
    assert session.state is StageState.IDLE
    assert [seq for seq, _ in session.output.waiting] == [0, 1, 2]


def test_a_step_that_the_first_stage_cut_is_not_cut_again() -> None:
    session = fresh()
    arrive(session, chunk(0, 0, 4))
    before = repr(session)
    with pytest.raises(IllegalTransition, match="2 of 4 tokens of a prefill step began"):
        session.handle(fsm.StepBegun(2))
    assert repr(session) == before, "a refused event changes nothing"


def test_several_prompt_steps_are_taken_in_order_and_only_the_last_one_samples() -> None:
    session = fresh(first=True, last=True)
    arrive(session, chunk(1, 3, 3), chunk(0, 0, 3), chunk(2, 6, 2))
    assert [compute(session), compute(session)] == [[], []]
    assert compute(session, 7) == [fsm.DeliverTokens(fsm.SampledTokens(0, (7,), "rows"))]


def test_the_first_stage_takes_no_decode_step_from_elsewhere() -> None:
    (rejected,) = arrive(prefilled(first=True), decode(1, 8))
    assert isinstance(rejected, fsm.RejectStep)
    assert "which makes them itself" in rejected.reason


def test_a_refill_is_computed_in_its_turn_sent_no_further_and_takes_nothing_back() -> None:
    for session in (prefilled(), prefilled(last=True, credit=1), prefilled(first=True)):
        sent = session.output.next_seq
        arrive(session, refill(1, 2, 4))
        assert (session.due, session.committed) == (8, 8)
        assert handle(session, fsm.StepBegun(4)) == [fsm.Acknowledge(2, 2 + STEP_WINDOW)]
        assert handle(session, fsm.StepComputed("rows")) == []
        assert (session.computed, session.output.next_seq) == (8, sent)


def test_a_refill_needs_no_credit_of_the_next_stage() -> None:
    session = fresh()
    for position in range(STEP_WINDOW):
        arrive(session, chunk(position, position))
        compute(session)
    arrive(session, refill(STEP_WINDOW, 0, 4), chunk(STEP_WINDOW + 1, STEP_WINDOW))
    compute(session)
    assert session.state is StageState.WAITING


def test_the_last_stage_samples_within_the_credit_of_the_coordinator() -> None:
    session = prefilled(last=True, credit=1)
    arrive(session, decode(1, 8))
    assert session.state is StageState.WAITING
    handle(session, fsm.TokensGranted(2))
    assert session.state is StageState.READY
    handle(session, fsm.TokensGranted(1))
    assert session.state is StageState.WAITING, "a lower credit holds the answer"
    handle(session, fsm.TokensGranted(5))
    assert compute(session, 101) == [fsm.DeliverTokens(fsm.SampledTokens(1, (101,), "rows"))]


@pytest.mark.parametrize("drafts", [(), (7, 8)], ids=["decode", "verify"])
def test_the_first_stage_begins_no_step_whose_token_the_coordinator_does_not_take(drafts: tuple[int, ...]) -> None:
    """An answer that is held before a change of plan would compute it for nothing, and the new plan's first step wait for it."""
    session = prefilled(first=True, credit=1)
    handle(session, fsm.TokensArrived(0, (100,), drafts))
    assert session.state is StageState.WAITING
    handle(session, fsm.TokensGranted(2))
    assert session.ready is not None
    assert session.ready.tokens == 1 + len(drafts)
    handle(session, fsm.TokensGranted(1))
    assert session.state is StageState.WAITING, "a lower credit holds the answer"


def test_the_credit_for_tokens_does_not_hold_up_the_prompt() -> None:
    session = fresh(first=True, credit=0)
    arrive(session, chunk(0, 0, PROMPT))
    assert session.state is StageState.READY


def test_a_refill_of_the_first_stage_comes_before_its_steps_that_wait_for_credit() -> None:
    session = prefilled(first=True, credit=1)
    handle(session, fsm.TokensArrived(0, (100,)))
    arrive(session, refill(1, 0, 4))
    assert session.ready == refill(1, 0, 4)
    compute(session)
    assert session.state is StageState.WAITING
    arrive(session, refill(2, 6, 3))
    assert session.state is StageState.WAITING, "it is also of a position that was not computed"
    handle(session, fsm.TokensGranted(2))
    compute(session)
    assert session.ready == refill(2, 6, 3)


def test_kv_is_freed_only_when_no_step_computes_on_it() -> None:
    session = in_state(StageState.COMPUTING)
    assert handle(session, fsm.StageEnded("closed")) == []
    assert handle(session, fsm.StepComputed("rows")) == [fsm.FreeKv("closed")]
    assert handle(in_state(StageState.IDLE), fsm.StageEnded("closed")) == [fsm.FreeKv("closed")]


def test_nothing_is_kept_of_an_ended_session() -> None:
    session = in_state(StageState.WAITING)
    handle(session, fsm.StageEnded("closed"))
    assert not any((session.inbox, session.input.early, session.output.waiting, session.guesses))


def test_with_kv_of_all_older_tokens_only_the_newest_is_computed() -> None:
    session = reopened()
    assert handle(session, fsm.StageResumed(7, 7)) == [fsm.BeginAt(7)]
    arrive(session, chunk(0, 7))
    assert session.ready == chunk(0, 7)


def test_kept_outputs_are_sent_in_chunks_within_the_window_before_the_first_step() -> None:
    session = reopened(chunk_tokens=1)
    begun, *replayed = handle(session, fsm.StageResumed(7, 1))
    assert begun == fsm.BeginAt(7)
    assert [command.sent.step.start for command in replayed if isinstance(command, fsm.Deliver)] == [1, 2, 3, 4]
    arrive(session, chunk(0, 7))
    assert session.state is StageState.WAITING
    (replayed_step,) = handle(session, fsm.OutputAcknowledged(1, 1 + STEP_WINDOW))
    expected = StageStep(5, 1, StepKind.PREFILL, committed=6)
    assert replayed_step == fsm.Deliver(fsm.SentStep(4, expected, None))
    handle(session, fsm.OutputAcknowledged(3, 3 + STEP_WINDOW))
    assert session.state is StageState.READY
    (delivered,) = compute(session)
    assert isinstance(delivered, fsm.Deliver)
    assert (delivered.sent.seq, delivered.sent.output) == (6, "rows")


def test_the_last_chunk_of_a_replay_ends_where_computing_starts() -> None:
    _, *replayed = handle(reopened(), fsm.StageResumed(7, 2))
    sent = [(command.sent.step.start, command.sent.step.tokens) for command in replayed if isinstance(command, fsm.Deliver)]
    assert sent == [(2, 2), (4, 2), (6, 1)]


def test_outputs_that_the_next_stage_has_are_computed_without_credit_and_not_sent() -> None:
    session = reopened()
    for _ in range(STEP_WINDOW):
        session.output.add(chunk(0, 0, 1), "rows")
    handle(session, fsm.StageResumed(0, 5))
    arrive(session, chunk(0, 0, 4), chunk(1, 4, 3), chunk(2, 7))
    assert compute(session) == []
    assert session.state is StageState.WAITING, "the next step has rows to send"
    handle(session, fsm.OutputAcknowledged(STEP_WINDOW, 2 * STEP_WINDOW))
    sent = [command.sent for _ in range(2) for command in compute(session) if isinstance(command, fsm.Deliver)]
    assert [(each.seq, each.step.start, each.skip) for each in sent] == [(4, 4, 1), (5, 7, 0)]


def test_the_last_stage_samples_whatever_send_from_is() -> None:
    session = reopened(last=True)
    handle(session, fsm.StageResumed(6, 7))
    arrive(session, chunk(0, 6, 2))
    assert compute(session, 4) == [fsm.DeliverTokens(fsm.SampledTokens(0, (4,), "rows"))]


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
    (refused,) = handle(reopened(**changes), fsm.StageResumed(start, send_from))
    assert isinstance(refused, fsm.RefuseResume)
    assert message_part in refused.reason


def test_steps_that_arrive_before_resume_wait_for_it_up_to_the_window() -> None:
    session = reopened(held=3)
    steps = [chunk(seq, 3 + seq) for seq in range(STEP_WINDOW)]
    assert arrive(session, *reversed(steps)) == []
    (rejected,) = arrive(session, chunk(STEP_WINDOW, 7))
    assert isinstance(rejected, fsm.RejectStep)
    assert handle(session, fsm.StageResumed(3, 3)) == [fsm.BeginAt(3)]
    assert list(session.inbox) == steps


def test_an_early_step_that_is_not_at_the_start_is_rejected_at_resume() -> None:
    session = reopened()
    arrive(session, chunk(0, 5))
    begun, rejected = handle(session, fsm.StageResumed(3, 3))
    assert begun == fsm.BeginAt(3)
    assert isinstance(rejected, fsm.RejectStep)


def test_a_second_resume_changes_nothing() -> None:
    session = reopened()
    handle(session, fsm.StageResumed(7, 7))
    before = repr(session)
    assert handle(session, fsm.StageResumed(0, 0)) == []
    assert repr(session) == before
