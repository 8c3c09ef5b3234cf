"""Guesses at one stage: which next step the first stage makes, and which steps the last stage drops, samples and waits with."""

from dataclasses import replace
from typing import Any

import pytest

from meshd.agents.stage.flow import events as fsm
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.flow.session import StageSession, StageState
from meshd.bounds import MAX_VERIFIED
from meshd.protocol.messages import STEP_WINDOW, StepKind

PROMPT = 8


def verify(start: int, *ids: int, seq: int = 0, **changes: Any) -> StageStep:
    step = StageStep(start, len(ids), StepKind.VERIFY, len(ids), min(start + 1, 9), seq, ids)
    return replace(step, **changes)


def decode(start: int, *ids: int, seq: int = 0) -> StageStep:
    return StageStep(start, 1, StepKind.DECODE, 1, start + 1, seq, ids)


def handle(session: StageSession, *events: fsm.Event) -> list[fsm.Command]:
    commands: list[fsm.Command] = []
    for event in events:
        commands += session.handle(event)
        session.validate()
    return commands


def compute(session: StageSession, *tokens: int) -> list[fsm.Command]:
    """Begin and compute the ready step. Returns: all commands but ACK."""
    assert session.ready is not None
    commands = handle(session, fsm.StepBegun(session.ready.tokens), fsm.StepComputed("rows", tokens))
    return [command for command in commands if not isinstance(command, fsm.Acknowledge)]


def prefilled(*, first: bool = False, last: bool = False, answer: int = 40, credit: int = 99) -> StageSession:
    """Make a session that has computed its prompt; the last stage has sampled token 100, for position 8."""
    session = StageSession(
        prompt_tokens=PROMPT, known_tokens=PROMPT, max_tokens=PROMPT + answer, token_credit=credit, first=first, last=last
    )
    handle(session, fsm.StepArrived(StageStep(0, PROMPT, StepKind.PREFILL, 1, PROMPT, 0)))
    compute(session, *([100] if last else []))
    handle(session, *([] if last else [fsm.OutputAcknowledged(1, 1 + STEP_WINDOW)]))
    return session


def first_stage(*drafts: int, **fields: Any) -> StageSession:
    """Make a first stage that has received token 100 and computed it with these guesses."""
    session = prefilled(first=True, **fields)
    handle(session, fsm.TokensArrived(0, (100,), drafts))
    compute(session)
    return session


def arrive(session: StageSession, *steps: StageStep) -> list[fsm.Command]:
    """Let steps arrive, with the next numbers of the edge."""
    return handle(session, *(fsm.StepArrived(replace(step, seq=session.input.next_seq + n)) for n, step in enumerate(steps)))


class TestFirstStage:
    def test_a_token_without_guesses_becomes_a_decode_step(self) -> None:
        session = prefilled(first=True)
        assert handle(session, fsm.TokensArrived(0, (100,))) == []
        assert session.ready == decode(8, 100)

    def test_a_token_with_guesses_becomes_a_verify_step(self) -> None:
        session = prefilled(first=True)
        handle(session, fsm.TokensArrived(0, (100,), (7, 8)))
        assert session.ready == verify(8, 100, 7, 8)
        (delivered,) = compute(session)
        assert isinstance(delivered, fsm.Deliver)
        assert (delivered.sent.seq, delivered.sent.step) == (1, verify(8, 100, 7, 8))

    def test_a_known_token_is_dropped_and_a_gap_rejected(self) -> None:
        session = first_stage()
        before = repr(session)
        assert handle(session, fsm.TokensArrived(0, (100,))) == []
        assert repr(session) == before
        (rejected,) = handle(session, fsm.TokensArrived(2, (102,)))
        assert isinstance(rejected, fsm.RejectStep)
        assert "answer token 2 came where 1 was due" in rejected.reason

    @pytest.mark.parametrize("tokens", [(7, 8, 50), (7, 50), (50,)])
    def test_the_next_step_begins_with_the_last_token_and_takes_wrong_guesses_back(self, tokens: tuple[int, ...]) -> None:
        session = first_stage(7, 8)
        handle(session, fsm.TokensArrived(1, tokens))
        assert session.ready == decode(8 + len(tokens), 50)
        assert session.due == 9 + len(tokens)
        truncated = [fsm.Truncate(8 + len(tokens))] if len(tokens) < 3 else []
        (*dropped, delivered) = compute(session)
        assert dropped == truncated
        assert isinstance(delivered, fsm.Deliver)

    def test_guesses_run_ahead_of_a_step_that_is_not_answered(self) -> None:
        session = first_stage(7)
        handle(session, fsm.TokensGuessed((8, 9)), fsm.TokensGuessed((10,)))
        assert list(session.inbox) == [verify(10, 8, 9), verify(12, 10)]

    def test_right_guesses_that_are_on_their_way_go_on(self) -> None:
        session = first_stage(7)
        handle(session, fsm.TokensGuessed((8, 9)))
        compute(session)
        assert handle(session, fsm.TokensArrived(1, (7, 8), (9, 9))) == []
        assert session.state is StageState.IDLE
        assert [guess.start for guess in session.guesses] == [10]
        handle(session, fsm.TokensArrived(3, (9, 50)))
        assert session.ready == decode(12, 50)

    def test_a_right_guess_that_has_not_begun_is_not_made_again(self) -> None:
        session = first_stage(7)
        handle(session, fsm.TokensGuessed((8, 9)))
        assert handle(session, fsm.TokensArrived(1, (7, 8))) == []
        assert session.ready == verify(10, 8, 9)

    @pytest.mark.parametrize("tokens", [(50,), (7, 50)], ids=["at another position", "at its position"])
    def test_wrong_guesses_that_have_not_begun_are_dropped(self, tokens: tuple[int, ...]) -> None:
        session = first_stage(7)
        handle(session, fsm.TokensGuessed((8, 9)), fsm.TokensGuessed((10,)), fsm.TokensArrived(1, tokens))
        assert list(session.inbox) == [decode(8 + len(tokens), 50)]
        assert not session.guesses

    def test_a_wrong_guess_that_computes_is_sent_and_taken_back_by_the_next_step(self) -> None:
        session = first_stage(7)
        handle(session, fsm.TokensGuessed((8, 9)), fsm.StepBegun(2), fsm.TokensArrived(1, (50,)))
        commands = handle(session, fsm.StepComputed("rows"))
        assert [command.sent.step for command in commands if isinstance(command, fsm.Deliver)] == [verify(10, 8, 9)]
        assert handle(session, fsm.StepBegun(1)) == [fsm.Truncate(9)]

    def test_guesses_are_bounded(self) -> None:
        session = first_stage(*range(200), answer=400)
        (guess,) = session.guesses
        assert guess.tokens == MAX_VERIFIED
        for _ in range(STEP_WINDOW):
            handle(session, fsm.TokensGuessed(tuple(range(200))))
        assert [step.tokens for step in session.guesses] == [MAX_VERIFIED] * STEP_WINDOW

    def test_no_guess_is_made_of_a_position_that_needs_no_computing(self) -> None:
        session = prefilled(first=True, answer=4)
        handle(session, fsm.TokensArrived(0, (100,), (1, 2, 3, 4, 5)))
        assert session.ready is not None
        assert session.ready.end <= PROMPT + 4 - 1, "the last token of the answer is sampled, and never computed"
        compute(session)
        assert handle(session, fsm.TokensGuessed((6,))) == []
        assert session.state is StageState.IDLE

    def test_guesses_before_the_whole_prompt_has_arrived_are_dropped(self) -> None:
        session = StageSession(
            prompt_tokens=PROMPT, known_tokens=PROMPT, max_tokens=PROMPT + 9, token_credit=9, first=True, last=False
        )
        handle(session, fsm.StepArrived(StageStep(0, 4, StepKind.PREFILL, 0, 4, 0)), fsm.TokensGuessed((1,)))
        assert len(session.inbox) == 1

    def test_many_wrong_guesses_do_not_use_the_credit_up(self) -> None:
        session = first_stage()
        begun = 2
        for number in range(3 * STEP_WINDOW):
            handle(session, fsm.TokensGuessed((1,)))
            compute(session)
            handle(session, fsm.TokensArrived(1 + number, (50,)))
            compute(session)
            begun += 2
            handle(session, fsm.OutputAcknowledged(begun, begun + STEP_WINDOW))
        assert session.output.next_seq == begun


class TestOnlyStage:
    def test_void_guesses_of_its_own_free_no_room_of_the_coordinators_edge(self) -> None:
        session = prefilled(first=True, last=True)
        handle(session, fsm.TokensArrived(0, (100,)), fsm.StepBegun(1), fsm.TokensGuessed((3, 4)))
        commands = handle(session, fsm.StepComputed("rows", (50,)))
        assert commands == [fsm.DeliverTokens(fsm.SampledTokens(1, (50,), "rows"))], "and need no ACK"
        assert (session.input.begun, session.input.next_seq) == (1, 1)
        handle(session, fsm.TokensArrived(1, (50,)))
        assert session.ready == decode(9, 50)


class TestLastStage:
    def test_a_verify_step_gives_the_tokens_up_to_the_first_mismatch(self) -> None:
        session = prefilled(last=True)
        arrive(session, verify(8, 100, 1, 2))
        assert compute(session, 1, 50) == [fsm.DeliverTokens(fsm.SampledTokens(1, (1, 50), "rows"))]
        arrive(session, decode(10))
        assert compute(session, 51) == [fsm.Truncate(10), fsm.DeliverTokens(fsm.SampledTokens(3, (51,), "rows"))]

    @pytest.mark.parametrize(
        "void",
        [verify(11, 3, 4), verify(10, 3, 4), verify(11, 50)],
        ids=["at a later position", "with another token", "with the right token too late"],
    )
    def test_void_guesses_are_answered_with_ack_and_no_tokens(self, void: StageStep) -> None:
        session = prefilled(last=True)
        arrive(session, verify(8, 100, 1, 2))
        handle(session, fsm.StepBegun(3))
        arrive(session, void)
        commands = handle(session, fsm.StepComputed("rows", (1, 50)))
        sampled = fsm.DeliverTokens(fsm.SampledTokens(1, (1, 50), "rows"))
        assert commands == [sampled, fsm.Acknowledge(3, 3 + STEP_WINDOW)]
        arrive(session, decode(10))
        assert session.ready is not None
        assert session.ready.start == 10

    def test_void_guesses_are_dropped_also_when_they_come_late(self) -> None:
        session = prefilled(last=True)
        arrive(session, decode(8))
        compute(session, 50)
        assert arrive(session, verify(9, 3)) == [fsm.Acknowledge(3, 3 + STEP_WINDOW)]
        assert session.state is StageState.IDLE

    def test_a_right_guess_behind_a_right_step_is_computed(self) -> None:
        session = prefilled(last=True)
        arrive(session, verify(8, 100, 1))
        handle(session, fsm.StepBegun(2))
        arrive(session, verify(10, 2, 3))
        handle(session, fsm.StepComputed("rows", (1, 2)))
        assert session.ready is not None
        assert session.ready.ids == (2, 3)

    def test_a_decode_step_that_is_not_at_the_newest_token_is_wrong(self) -> None:
        session = prefilled(last=True)
        arrive(session, verify(8, 100, 1, 2))
        compute(session, 1, 50)
        (rejected,) = arrive(session, decode(9))
        assert isinstance(rejected, fsm.RejectStep)
        assert "where 10 is the newest token" in rejected.reason

    @pytest.mark.parametrize(("credit", "ids"), [(2, (100,)), (3, (100, 1)), (4, (100, 1, 2))])
    def test_of_a_verify_step_the_tokens_with_credit_are_computed(self, credit: int, ids: tuple[int, ...]) -> None:
        """A client that reads slowly may not give credit for the whole step for a long time: the step must not wait for that."""
        session = prefilled(last=True, credit=1)
        arrive(session, verify(8, 100, 1, 2))
        assert session.state is StageState.WAITING
        handle(session, fsm.TokensGranted(credit), fsm.StepBegun(3))
        assert session.computing == verify(8, *ids, seq=1)
        sampled = fsm.SampledTokens(1, (1, 2, 3)[: len(ids)], "rows")
        assert handle(session, fsm.StepComputed("rows", sampled.tokens)) == [fsm.DeliverTokens(sampled)]
        assert arrive(session, verify(11, 9)) == [fsm.Acknowledge(3, 3 + STEP_WINDOW)], "it is void"
        arrive(session, decode(8 + len(ids)))
        assert session.state is StageState.WAITING
        handle(session, fsm.TokensGranted(9))
        assert session.ready is not None
        assert session.ready.start == 8 + len(ids)

    def test_the_credit_of_a_whole_answer_suffices_for_its_guesses(self) -> None:
        first, last = prefilled(first=True, answer=4), prefilled(last=True, answer=4, credit=4)
        handle(first, fsm.TokensArrived(0, (100,), (1, 2, 3, 4, 5)))
        assert first.ready is not None
        arrive(last, first.ready)
        assert last.state is StageState.READY

    @pytest.mark.parametrize(
        ("step", "message_part"),
        [
            (verify(8, 100, 1, sample=1), "samples 1"),
            (verify(8, 100, 1, committed=10), "commits 10"),
            (verify(8, 100, ids=(100, 1)), "has 2 ids"),
            (verify(7, 100), "a step at 7 came where one from 8 to 8 was due"),
            (verify(9, 100), "a step at 9 came where one from 8 to 8 was due"),
            (verify(8, *range(41)), "past the 48 reserved"),
        ],
    )
    def test_a_verify_step_that_breaks_a_rule_is_rejected(self, step: StageStep, message_part: str) -> None:
        for last in (True, False):
            (rejected,) = arrive(prefilled(last=last), step)
            assert isinstance(rejected, fsm.RejectStep)
            assert message_part in rejected.reason
