"""A copy's machine: every transition walked; it catches up, tells of it once, and never sends what the target has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.stage import mirror_copy as machine
from meshd.agents.stage.mirror_copy import TRANSITIONS, Copying, IllegalTransition, Report, SendPiece, State


def fresh(filled: int = 100, *, eager: bool = False, piece: int = 40) -> Copying:
    return Copying(filled, piece, 32, eager)


def accepted(filled: int = 100, held: int = 0, *, eager: bool = False) -> Copying:
    copy = fresh(filled, eager=eager)
    copy.handle(machine.Accepted(held))
    return copy


def level(*, eager: bool = False) -> Copying:
    return accepted(100, 100, eager=eager)


def in_state(state: State) -> Copying:
    copy = {State.OFFERED: fresh, State.BEHIND: accepted, State.LEVEL: level, State.ENDED: fresh}[state]()
    if state is State.ENDED:
        copy.handle(machine.Stopped())
    assert copy.state is state
    return copy


EVENTS: list[machine.Event] = [
    machine.Accepted(10),
    machine.Grown(140),
    machine.Stored(40),
    machine.Hurried(eager=True),
    machine.Ticked(),
    machine.Failed("a test"),
    machine.Stopped(),
]


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(state: State, event: machine.Event) -> None:
    copy = in_state(state)
    before = repr(copy)
    if (state, type(event)) in TRANSITIONS:
        copy.handle(event)
        copy.validate()
    else:
        with pytest.raises(IllegalTransition):
            copy.handle(event)
        assert repr(copy) == before


def test_two_pieces_are_on_the_way_until_all_is_there_and_that_is_told_once() -> None:
    copy = fresh()
    assert copy.handle(machine.Accepted(0)) == [SendPiece(0, 40), SendPiece(40, 40)]
    assert copy.handle(machine.Stored(40)) == [SendPiece(80, 20)]
    assert copy.handle(machine.Stored(80)) == [Report(80, 100)]
    assert copy.handle(machine.Stored(100)) == []
    assert copy.state is State.LEVEL


def test_what_the_target_has_is_not_sent() -> None:
    assert fresh().handle(machine.Accepted(90)) == [Report(90, 100), SendPiece(90, 10)]
    assert fresh().handle(machine.Accepted(500)) == [Report(100, 100)]


def test_a_mirror_follows_by_the_block_and_tells_each_time() -> None:
    copy = level()
    assert copy.handle(machine.Grown(131)) == []
    assert copy.handle(machine.Grown(132)) == [SendPiece(100, 32)]
    assert copy.state is State.BEHIND
    assert copy.handle(machine.Stored(132)) == [Report(132, 132)]


def test_a_move_follows_every_token() -> None:
    copy = level(eager=True)
    assert copy.handle(machine.Grown(101)) == [SendPiece(100, 1)]
    assert copy.handle(machine.Grown(102)) == [SendPiece(101, 1)]
    assert copy.handle(machine.Grown(103)) == [], "two are on the way"
    assert copy.handle(machine.Stored(101)) == [SendPiece(102, 1)]


def test_a_mirror_that_is_hurried_sends_the_rest_and_tells_when_it_is_near() -> None:
    copy = level()
    copy.handle(machine.Grown(120))
    assert copy.handle(machine.Hurried(eager=True)) == [SendPiece(100, 20)]
    assert copy.handle(machine.Stored(120)) == [Report(120, 120)]


def test_a_piece_that_was_not_taken_is_sent_again_a_few_times() -> None:
    copy = accepted(30)
    for _ in range(3):
        assert copy.handle(machine.Stored(0)) == [SendPiece(0, 30)]
    assert copy.handle(machine.Stored(0)) == [Report(0, 30, "the target takes nothing")]
    assert copy.state is State.ENDED


def test_while_it_is_behind_it_tells_at_every_tick() -> None:
    assert accepted().handle(machine.Ticked()) == [Report(0, 100)]
    assert level().handle(machine.Ticked()) == []


@pytest.mark.parametrize("copy", [fresh(), accepted()], ids=["offered", "under way"])
def test_a_target_that_answers_nothing_is_given_up(copy: Copying) -> None:
    told = [command for _ in range(30) for command in copy.handle(machine.Ticked())]
    assert [report for report in told if isinstance(report, Report) and report.error] == told[-1:]
    assert copy.state is State.ENDED


def test_a_target_that_is_quiet_because_there_is_nothing_to_take_is_not() -> None:
    copy = level()
    for _ in range(100):
        copy.handle(machine.Ticked())
    copy.handle(machine.Grown(140))
    assert copy.state is State.BEHIND


@given(
    st.integers(0, 200),
    st.integers(0, 250),
    st.booleans(),
    st.lists(st.sampled_from(["grow", "grow much", "take", "lose", "hurry", "slow", "tick"]), max_size=100),
)
def test_the_target_ends_up_with_all(filled: int, held: int, eager: bool, actions: list[str]) -> None:
    copy = Copying(filled, 40, 32, eager)
    target, pieces = min(held, filled), []

    def apply(event: machine.Event) -> None:
        for command in copy.handle(event):
            if isinstance(command, SendPiece):
                pieces.append(command)
                assert command.position + command.tokens <= copy.filled
        if copy.state is not State.ENDED:
            copy.validate()

    def take() -> None:
        nonlocal target
        piece = pieces.pop(0)
        if piece.position <= target:
            target = piece.position + piece.tokens
        apply(machine.Stored(target))

    apply(machine.Accepted(held))
    for action in actions:
        if action.startswith("grow"):
            apply(machine.Grown(copy.filled + (1 if action == "grow" else 50)))
        elif action == "take" and pieces:
            take()
        elif action == "lose" and len(pieces) > 1:
            del pieces[0]
            apply(machine.Stored(target))
        elif action == "hurry":
            apply(machine.Hurried(eager=True))
        elif action == "slow":
            apply(machine.Hurried(eager=False))
        elif action == "tick":
            apply(machine.Ticked())
    if copy.state is State.ENDED:
        return
    apply(machine.Hurried(eager=True))
    while pieces:
        take()
    if copy.state is not State.ENDED:
        assert target == copy.held == copy.filled
        assert copy.state is State.LEVEL
