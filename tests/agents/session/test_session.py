"""The session's state machine: every state with every event, and invariants after each event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.machine import IllegalTransition
from meshd.agents.session import events
from meshd.agents.session.plan.resume import ResumePoint, StageHeld
from meshd.agents.session.session import (
    CREDIT_TOKENS,
    MAX_ATTEMPTS,
    TERMINAL,
    TRANSITIONS,
    Session,
    SessionState,
)
from meshd.errors import Cancelled, DoesNotFit, InvalidSampling, OutOfMemory
from meshd.types import FinishReason, LayerRange, ModelId, PeerId, Plan, PlanId, SessionId, StagePlan

PROMPT = 10
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def plan_of(*stages: tuple[PeerId, int, int]) -> Plan:
    return Plan(
        id=PlanId("-".join(peer for peer, _, _ in stages)),
        model=ModelId("m"),
        stages=tuple(StagePlan(peer=peer, layers=LayerRange(start, end)) for peer, start, end in stages),
        prefill_chunk_tokens=128,
        context=64,
    )


PLAN = plan_of((A, 0, 2), (B, 2, 5))
WITHOUT_B = plan_of((A, 0, 2), (C, 2, 5))

EVENTS: dict[type, events.Event] = {
    events.Planned: events.Planned(PLAN),
    events.PlanFailed: events.PlanFailed(DoesNotFit("no peer has layers 2-5")),
    events.StageOpened: events.StageOpened(1, 0),
    events.StageFailed: events.StageFailed(1, 0, OutOfMemory("no room"), B),
    events.TokenArrived: events.TokenArrived(1, 0, 7),
    events.TokensRead: events.TokensRead(1),
    events.StopMatched: events.StopMatched(),
    events.PeerGone: events.PeerGone(B, "killed"),
    events.DeadlinePassed: events.DeadlinePassed("silence", B),
    events.Suspend: events.Suspend(),
    events.ResumeRequested: events.ResumeRequested(),
    events.Released: events.Released(Cancelled("taken over")),
    events.Reclaimed: events.Reclaimed(1000),
    events.CancelRequested: events.CancelRequested(),
}


def in_state(state: SessionState) -> Session:
    session = Session(SessionId("s"), PROMPT)
    paths: dict[SessionState, list[events.Event]] = {
        SessionState.NEW: [],
        SessionState.OPENING: [events.Planned(PLAN)],
        SessionState.PREFILLING: [events.Planned(PLAN), events.StageOpened(1, 0), events.StageOpened(1, 1)],
    }
    paths[SessionState.DECODING] = [*paths[SessionState.PREFILLING], events.TokenArrived(1, 0, 7)]
    paths[SessionState.RECOVERING] = [*paths[SessionState.DECODING], events.PeerGone(B, "killed")]
    paths[SessionState.SUSPENDED] = [*paths[SessionState.DECODING], events.Suspend()]
    paths[SessionState.FINISHED] = [*paths[SessionState.PREFILLING], events.TokenArrived(1, 0, 7, None, FinishReason.LENGTH)]
    paths[SessionState.FAILED] = [events.PlanFailed(DoesNotFit("too large"))]
    paths[SessionState.CANCELLED] = [*paths[SessionState.DECODING], events.CancelRequested()]
    for event in paths[state]:
        session.handle(event)
        session.validate()
    assert session.state is state
    return session


@pytest.mark.parametrize("state", list(SessionState))
@pytest.mark.parametrize("kind", list(EVENTS), ids=lambda kind: kind.__name__)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(state: SessionState, kind: type) -> None:
    session = in_state(state)
    before = repr(session)
    event = EVENTS[kind]
    stale = getattr(event, "epoch", session.epoch) != session.epoch
    if stale:
        assert session.handle(event) == []
        assert repr(session) == before
    elif (state, kind) in TRANSITIONS:
        session.handle(event)
        session.validate()
    else:
        with pytest.raises(IllegalTransition):
            session.handle(event)
        assert repr(session) == before


def test_the_prompt_is_sent_when_all_stages_are_open() -> None:
    session = Session(SessionId("s"), PROMPT)
    assert session.handle(events.Planned(PLAN)) == [events.OpenStages(1, PLAN, CREDIT_TOKENS, 0)]
    assert session.handle(events.StageOpened(1, 1)) == []
    assert session.handle(events.StageOpened(1, 0)) == [events.SendPrompt(1, PLAN, 0)]


def test_a_message_of_an_older_epoch_is_dropped() -> None:
    session = in_state(SessionState.DECODING)
    assert session.handle(events.TokenArrived(0, 1, 9)) == []
    assert session.tokens == [7]


def test_a_repeated_token_is_emitted_once() -> None:
    session = in_state(SessionState.DECODING)
    assert session.handle(events.TokenArrived(1, 0, 7)) == []
    assert session.handle(events.TokenArrived(1, 1, 8)) == [events.EmitToken(1, 8, None, None)]


def test_a_gap_in_the_tokens_asks_for_another_plan() -> None:
    session = in_state(SessionState.DECODING)
    (command,) = session.handle(events.TokenArrived(1, 5, 8))
    assert isinstance(command, events.Replan)
    assert command.avoid == {B}, "the last stage has skipped tokens"
    assert session.tokens == [7]


def test_after_a_loss_the_answer_resumes_in_the_next_epoch_from_what_its_stages_hold() -> None:
    session = in_state(SessionState.DECODING)
    (replan,) = session.handle(events.PeerGone(B, "killed"))
    assert isinstance(replan, events.Replan)
    assert replan.lost == {B}
    assert "2-5" in replan.reason
    assert session.handle(events.Planned(WITHOUT_B)) == [events.OpenStages(2, WITHOUT_B, CREDIT_TOKENS, 1)]
    assert session.handle(events.StageOpened(1, 0)) == []  # a late message of the old epoch
    session.handle(events.StageOpened(2, 0, StageHeld(10, False, 0, 10)))
    held = (StageHeld(10, False, 0, 10), StageHeld(0))
    assert session.handle(events.StageOpened(2, 1, StageHeld(0))) == [
        events.ResumeStages(2, WITHOUT_B, held, (ResumePoint(10, 0), ResumePoint(0, 10))),
        events.SendPrompt(2, WITHOUT_B, 10),
    ]
    assert session.handle(events.TokenArrived(2, 1, 8)) == [events.EmitToken(1, 8, None, None)]


def test_a_peer_outside_the_new_plan_is_closed_once_the_new_plan_is_open() -> None:
    session = in_state(SessionState.DECODING)
    session.handle(events.DeadlinePassed("silence", B))
    session.handle(events.Planned(WITHOUT_B))
    session.handle(events.StageOpened(2, 0))
    commands = session.handle(events.StageOpened(2, 1))
    assert commands[0] == events.CloseStages(1, (B,), "not in the new plan")


def test_a_token_made_before_the_loss_still_counts() -> None:
    session = in_state(SessionState.RECOVERING)
    assert session.handle(events.TokenArrived(1, 1, 8)) == [events.EmitToken(1, 8, None, None)]
    assert session.state is SessionState.RECOVERING


def test_a_second_loss_during_recovery_asks_for_a_plan_without_both_peers() -> None:
    session = in_state(SessionState.RECOVERING)
    (replan,) = session.handle(events.PeerGone(C, "killed too"))
    assert isinstance(replan, events.Replan)
    assert replan.lost == {B, C}


def test_a_replacement_that_fails_to_open_is_avoided_next() -> None:
    session = in_state(SessionState.RECOVERING)
    session.handle(events.Planned(WITHOUT_B))
    close, replan = session.handle(events.StageFailed(2, 1, OutOfMemory("full"), C))
    assert close == events.CloseStages(2, (A, C), "the plan did not open", undo=True)
    assert isinstance(replan, events.Replan)
    assert replan.avoid == {C}


def test_a_first_plan_that_opens_only_in_part_is_closed_before_the_next_try() -> None:
    session = in_state(SessionState.OPENING)
    session.handle(events.StageOpened(1, 0))
    close, replan = session.handle(events.StageFailed(1, 1, OutOfMemory("full"), B))
    assert close == events.CloseStages(1, (A, B), "the plan did not open", undo=True)
    assert isinstance(replan, events.Replan)
    assert not session.holders, "no peer holds anything of it, so none is sent RENEW"


@pytest.mark.parametrize("event", [events.DeadlinePassed("silence", C), events.PeerGone(C, "killed")])
def test_a_later_plan_that_does_not_open_frees_only_what_it_reserved(event: events.Event) -> None:
    session = in_state(SessionState.RECOVERING)
    session.handle(events.Planned(WITHOUT_B))
    session.handle(events.StageOpened(2, 0, StageHeld(10)))
    close, _ = session.handle(event)
    assert isinstance(close, events.CloseStages)
    assert (close.epoch, close.undo) == (2, True)
    assert A in close.peers
    assert A in session.holders, "it still has the KV of the plan that ran"
    assert C not in session.holders


def test_a_request_that_no_peer_could_meet_fails_even_if_it_has_begun() -> None:
    session = in_state(SessionState.DECODING)
    (replan,) = session.handle(events.StageFailed(1, 1, InvalidSampling("a penalty"), None))
    assert isinstance(replan, events.Replan)
    assert not replan.avoid
    session.handle(events.PlanFailed(InvalidSampling("a penalty")))
    assert session.state is SessionState.FAILED


def test_without_a_plan_a_begun_session_is_suspended_with_the_error_and_can_resume() -> None:
    session = in_state(SessionState.RECOVERING)
    error = DoesNotFit("no peer has layers 2-5")
    commands = session.handle(events.PlanFailed(error))
    assert commands == [events.CloseStages(1, (A,), "suspended"), events.EmitSuspended(error)]
    (replan,) = session.handle(events.ResumeRequested())
    assert isinstance(replan, events.Replan)
    session.handle(events.Planned(PLAN))
    assert session.epoch > 2
    assert session.tokens == [7]


def test_a_move_is_a_change_of_plan_with_nothing_lost() -> None:
    session = in_state(SessionState.DECODING)
    (open_stages,) = session.handle(events.Planned(WITHOUT_B))
    assert isinstance(open_stages, events.OpenStages)
    assert session.state is SessionState.OPENING
    close, replan = session.handle(events.StageFailed(2, 1, OutOfMemory("full"), C))
    assert close == events.CloseStages(2, (A, C), "the plan did not open", undo=True)
    assert isinstance(replan, events.Replan)
    assert session.kv_plan == PLAN, "the source still has all KV"


def test_after_too_many_changes_of_plan_the_session_is_suspended() -> None:
    session = in_state(SessionState.RECOVERING)
    for _ in range(MAX_ATTEMPTS):
        session.handle(events.Planned(WITHOUT_B))
        session.handle(events.StageFailed(session.epoch, 1, OutOfMemory("full"), C))
    commands = session.handle(events.Planned(WITHOUT_B))
    assert session.state is SessionState.SUSPENDED
    assert isinstance(commands[-1], events.EmitSuspended)
    assert isinstance(commands[-1].error, OutOfMemory)


def test_a_released_session_leaves_its_stages_open() -> None:
    session = in_state(SessionState.DECODING)
    commands = session.handle(EVENTS[events.Released])
    assert not any(isinstance(command, events.CloseStages) for command in commands)
    assert session.state is SessionState.CANCELLED


def test_a_reclaimed_session_skips_the_epochs_of_the_other_coordinator() -> None:
    session = in_state(SessionState.RECOVERING)
    assert session.handle(EVENTS[events.Reclaimed]) == []
    session.handle(events.Planned(WITHOUT_B))
    assert session.epoch == 1001


def test_the_loss_of_a_peer_outside_the_plan_changes_nothing() -> None:
    session = in_state(SessionState.DECODING)
    assert session.handle(events.PeerGone(C, "killed")) == []
    assert session.state is SessionState.DECODING


def test_credit_grows_half_a_window_at_a_time() -> None:
    session = in_state(SessionState.DECODING)
    granted = [command for read in range(1, CREDIT_TOKENS + 1) for command in session.handle(events.TokensRead(read))]
    assert granted == [
        events.GrantCredit(1, PLAN, CREDIT_TOKENS + CREDIT_TOKENS // 2),
        events.GrantCredit(1, PLAN, 2 * CREDIT_TOKENS),
    ]


def test_credit_that_grows_during_recovery_is_sent_with_the_next_open() -> None:
    session = in_state(SessionState.RECOVERING)
    assert session.handle(events.TokensRead(CREDIT_TOKENS)) == []
    (command,) = session.handle(events.Planned(WITHOUT_B))
    assert isinstance(command, events.OpenStages)
    assert command.credit == 2 * CREDIT_TOKENS


def test_credit_that_grows_while_stages_open_is_sent_when_all_are_open() -> None:
    session = in_state(SessionState.OPENING)
    assert session.handle(events.TokensRead(CREDIT_TOKENS)) == []
    held = StageHeld(0, 0, 0, 0)
    assert session.handle(events.StageOpened(1, 0, held)) == []
    assert events.GrantCredit(1, PLAN, 2 * CREDIT_TOKENS) in session.handle(events.StageOpened(1, 1, held))


def test_after_the_end_no_event_emits_anything() -> None:
    session = in_state(SessionState.FINISHED)
    for kind, event in EVENTS.items():
        if kind is not events.Planned:
            assert session.handle(event) == []


PLANS = st.sampled_from([PLAN, WITHOUT_B, plan_of((C, 0, 5)), plan_of((A, 0, 2), (A, 2, 5))])


@given(st.lists(st.sampled_from([*EVENTS.values(), *[EVENTS[events.StageOpened]] * 6]), max_size=60), st.data())
def test_invariants_hold_under_any_order_of_events(sequence: list[events.Event], data: st.DataObject) -> None:
    session = Session(SessionId("s"), PROMPT)
    emitted: list[int] = []
    epochs: list[int] = []
    ends = 0
    for event in sequence:
        match event:
            case events.TokenArrived():
                if len(session.tokens) >= session.credit:
                    continue  # stages stop at the credit, so no further token can arrive
                event = events.TokenArrived(session.epoch, data.draw(st.integers(0, len(session.tokens) + 1)), 7)
            case events.Planned():
                event = events.Planned(data.draw(PLANS))
            case events.StageOpened():
                stages = len(session.plan.stages) if session.plan else 1
                held = StageHeld(data.draw(st.integers(0, 20)))
                event = events.StageOpened(session.epoch, data.draw(st.integers(0, stages - 1)), held)
            case events.StageFailed():
                event = events.StageFailed(session.epoch, 0, OutOfMemory("no room"), data.draw(st.sampled_from([None, A, B])))
        try:
            commands = session.handle(event)
        except IllegalTransition:
            continue
        session.validate()
        epochs.append(session.epoch)
        emitted += [command.index for command in commands if isinstance(command, events.EmitToken)]
        ends += sum(isinstance(command, events.EmitEnd) for command in commands)
    assert emitted == list(range(len(emitted)))
    assert epochs == sorted(epochs)
    assert ends == (session.state in TERMINAL)
