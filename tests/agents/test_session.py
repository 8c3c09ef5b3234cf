"""The session's machine: every transition walked, invariants after each event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents import session as machine
from meshd.agents.session import CREDIT_TOKENS, TERMINAL, TRANSITIONS, IllegalTransition, Session, State
from meshd.errors import OutOfMemory, PeerLost
from meshd.types import FinishReason, LayerRange, ModelId, PeerId, Plan, PlanId, SessionId, StagePlan

PLAN = Plan(
    id=PlanId("p"),
    model=ModelId("m"),
    stages=(
        StagePlan(peer=PeerId("a"), layers=LayerRange(0, 2)),
        StagePlan(peer=PeerId("b"), layers=LayerRange(2, 5)),
    ),
    prefill_chunk_tokens=128,
    context=64,
)

EVENTS: dict[type, machine.Event] = {
    machine.Planned: machine.Planned(PLAN),
    machine.StageOpened: machine.StageOpened(1, 0),
    machine.StageFailed: machine.StageFailed(1, 0, OutOfMemory("no room")),
    machine.TokenArrived: machine.TokenArrived(1, 0, 7),
    machine.TokensRead: machine.TokensRead(1),
    machine.StopMatched: machine.StopMatched(),
    machine.PeerGone: machine.PeerGone(PeerId("b"), "killed"),
    machine.DeadlinePassed: machine.DeadlinePassed("silence"),
    machine.CancelRequested: machine.CancelRequested(),
}


def in_state(state: State) -> Session:
    session = Session(SessionId("s"))
    paths: dict[State, list[machine.Event]] = {
        State.NEW: [],
        State.OPENING: [machine.Planned(PLAN)],
        State.PREFILLING: [machine.Planned(PLAN), machine.StageOpened(1, 0), machine.StageOpened(1, 1)],
    }
    paths[State.DECODING] = [*paths[State.PREFILLING], machine.TokenArrived(1, 0, 7)]
    paths[State.FINISHED] = [*paths[State.PREFILLING], machine.TokenArrived(1, 0, 7, None, FinishReason.LENGTH)]
    paths[State.FAILED] = [*paths[State.DECODING], machine.PeerGone(PeerId("a"), "killed")]
    paths[State.CANCELLED] = [*paths[State.DECODING], machine.CancelRequested()]
    for event in paths[state]:
        session.handle(event)
        session.validate()
    assert session.state is state
    return session


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("kind", list(EVENTS), ids=lambda kind: kind.__name__)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(state: State, kind: type) -> None:
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


def test_the_prompt_goes_out_when_the_last_stage_has_opened() -> None:
    session = Session(SessionId("s"))
    assert session.handle(machine.Planned(PLAN)) == [machine.OpenStages(1, PLAN, CREDIT_TOKENS)]
    assert session.handle(machine.StageOpened(1, 1)) == []
    assert session.handle(machine.StageOpened(1, 0)) == [machine.SendPrompt(1, PLAN)]


def test_a_message_of_an_older_epoch_is_dropped() -> None:
    session = in_state(State.DECODING)
    assert session.handle(machine.TokenArrived(0, 1, 9)) == []
    assert session.tokens == [7]


def test_a_repeated_token_is_emitted_once() -> None:
    session = in_state(State.DECODING)
    assert session.handle(machine.TokenArrived(1, 0, 7)) == []
    assert session.handle(machine.TokenArrived(1, 1, 8)) == [machine.EmitToken(1, 8, None, None)]


def test_a_gap_in_the_tokens_ends_the_session_with_an_error() -> None:
    session = in_state(State.DECODING)
    commands = session.handle(machine.TokenArrived(1, 5, 8))
    assert session.state is State.FAILED
    assert isinstance(commands[-1], machine.EmitEnd)
    assert isinstance(commands[-1].error, PeerLost)


def test_the_loss_of_a_peer_names_its_layers_and_closes_the_others() -> None:
    session = in_state(State.DECODING)
    close, end = session.handle(machine.PeerGone(PeerId("b"), "killed"))
    assert close == machine.CloseStages(1, (PeerId("a"), PeerId("b")), "error")
    assert isinstance(end, machine.EmitEnd)
    assert "2-5" in str(end.error)


def test_the_loss_of_a_peer_outside_the_plan_changes_nothing() -> None:
    session = in_state(State.DECODING)
    assert session.handle(machine.PeerGone(PeerId("c"), "killed")) == []
    assert session.state is State.DECODING


def test_credit_grows_half_a_window_at_a_time() -> None:
    session = in_state(State.DECODING)
    granted = [command for read in range(1, CREDIT_TOKENS + 1) for command in session.handle(machine.TokensRead(read))]
    assert granted == [
        machine.GrantCredit(1, PeerId("a"), CREDIT_TOKENS + CREDIT_TOKENS // 2),
        machine.GrantCredit(1, PeerId("a"), 2 * CREDIT_TOKENS),
    ]


def test_an_end_is_emitted_once_whatever_comes_after() -> None:
    session = in_state(State.FINISHED)
    for kind, event in EVENTS.items():
        if kind is not machine.Planned:
            assert session.handle(event) == []


@given(st.lists(st.sampled_from(list(EVENTS.values())), max_size=30), st.data())
def test_invariants_hold_under_any_order_of_events(events: list[machine.Event], data: st.DataObject) -> None:
    session = Session(SessionId("s"))
    emitted: list[int] = []
    ends = 0
    for event in events:
        if isinstance(event, machine.TokenArrived):
            if len(session.tokens) >= session.credit:
                continue  # stage 0 obeys the credit
            event = machine.TokenArrived(session.epoch, data.draw(st.integers(0, len(session.tokens) + 1)), 7)
        try:
            commands = session.handle(event)
        except IllegalTransition:
            continue
        session.validate()
        emitted += [command.index for command in commands if isinstance(command, machine.EmitToken)]
        ends += sum(isinstance(command, machine.EmitEnd) for command in commands)
    assert emitted == list(range(len(emitted)))
    assert ends == (session.state in TERMINAL)
