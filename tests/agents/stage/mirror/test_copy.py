"""The state machine of a copy: all transitions; a copy catches up, reports that once, and sends nothing that the target has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.machine import IllegalTransition
from meshd.agents.stage.mirror import copy as machine
from meshd.agents.stage.mirror.copy import TRANSITIONS, MirrorCopy, MirrorState, ReportProgress, SendBlocks


def fresh(filled: int = 100, *, eager: bool = False, chunk: int = 40) -> MirrorCopy:
    return MirrorCopy(filled, chunk, 32, eager)


def accepted(filled: int = 100, held: int = 0, *, eager: bool = False) -> MirrorCopy:
    copy = fresh(filled, eager=eager)
    copy.handle(machine.OfferAccepted(held))
    return copy


def level(*, eager: bool = False) -> MirrorCopy:
    return accepted(100, 100, eager=eager)


def in_state(state: MirrorState) -> MirrorCopy:
    copy = {MirrorState.OFFERED: fresh, MirrorState.BEHIND: accepted, MirrorState.LEVEL: level, MirrorState.ENDED: fresh}[state]()
    if state is MirrorState.ENDED:
        copy.handle(machine.CopyStopped())
    assert copy.state is state
    return copy


EVENTS: list[machine.Event] = [
    machine.OfferAccepted(10),
    machine.KvGrown(140),
    machine.BlocksStored(40),
    machine.EagernessChanged(eager=True),
    machine.TimePassed(),
    machine.CopyFailed("a test"),
    machine.CopyStopped(),
]


@pytest.mark.parametrize("state", list(MirrorState))
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_pair_of_state_and_event_is_a_transition_or_raises_and_changes_nothing(
    state: MirrorState, event: machine.Event
) -> None:
    copy = in_state(state)
    before = repr(copy)
    if (state, type(event)) in TRANSITIONS:
        copy.handle(event)
        copy.validate()
    else:
        with pytest.raises(IllegalTransition):
            copy.handle(event)
        assert repr(copy) == before


def test_two_chunks_are_in_flight_until_all_are_stored_and_that_is_reported_once() -> None:
    copy = fresh()
    assert copy.handle(machine.OfferAccepted(0)) == [SendBlocks(0, 40), SendBlocks(40, 40)]
    assert copy.handle(machine.BlocksStored(40)) == [SendBlocks(80, 20)]
    assert copy.handle(machine.BlocksStored(80)) == [ReportProgress(80, 100)]
    assert copy.handle(machine.BlocksStored(100)) == []
    assert copy.state is MirrorState.LEVEL


def test_kv_that_the_target_has_is_not_sent() -> None:
    assert fresh().handle(machine.OfferAccepted(90)) == [ReportProgress(90, 100), SendBlocks(90, 10)]
    assert fresh().handle(machine.OfferAccepted(500)) == [ReportProgress(100, 100)]


def test_a_mirror_follows_in_blocks_and_reports_each_one() -> None:
    copy = level()
    assert copy.handle(machine.KvGrown(131)) == []
    assert copy.handle(machine.KvGrown(132)) == [SendBlocks(100, 32)]
    assert copy.state is MirrorState.BEHIND
    assert copy.handle(machine.BlocksStored(132)) == [ReportProgress(132, 132)]


def test_a_move_follows_every_token() -> None:
    copy = level(eager=True)
    assert copy.handle(machine.KvGrown(101)) == [SendBlocks(100, 1)]
    assert copy.handle(machine.KvGrown(102)) == [SendBlocks(101, 1)]
    assert copy.handle(machine.KvGrown(103)) == [], "two are in flight"
    assert copy.handle(machine.BlocksStored(101)) == [SendBlocks(102, 1)]


def test_a_mirror_made_eager_sends_the_rest_and_reports_when_it_is_level() -> None:
    copy = level()
    copy.handle(machine.KvGrown(120))
    assert copy.handle(machine.EagernessChanged(eager=True)) == [SendBlocks(100, 20)]
    assert copy.handle(machine.BlocksStored(120)) == [ReportProgress(120, 120)]


def test_a_chunk_that_was_not_stored_is_sent_again_three_times() -> None:
    copy = accepted(30)
    for _ in range(3):
        assert copy.handle(machine.BlocksStored(0)) == [SendBlocks(0, 30)]
    assert copy.handle(machine.BlocksStored(0)) == [ReportProgress(0, 30, "the target stores nothing")]
    assert copy.state is MirrorState.ENDED


def test_a_copy_that_is_behind_reports_at_every_tick() -> None:
    assert accepted().handle(machine.TimePassed()) == [ReportProgress(0, 100)]
    assert level().handle(machine.TimePassed()) == []


@pytest.mark.parametrize("copy", [fresh(), accepted()], ids=["offered", "under way"])
def test_a_copy_fails_if_the_target_does_not_answer(copy: MirrorCopy) -> None:
    commands = [command for _ in range(30) for command in copy.handle(machine.TimePassed())]
    assert [report for report in commands if isinstance(report, ReportProgress) and report.error] == commands[-1:]
    assert copy.state is MirrorState.ENDED


def test_a_level_copy_does_not_fail_while_there_is_nothing_to_send() -> None:
    copy = level()
    for _ in range(100):
        copy.handle(machine.TimePassed())
    copy.handle(machine.KvGrown(140))
    assert copy.state is MirrorState.BEHIND


@given(
    st.integers(0, 200),
    st.integers(0, 250),
    st.booleans(),
    st.lists(st.sampled_from(["grow", "grow much", "store", "lose", "eager", "lazy", "tick"]), max_size=100),
)
def test_the_target_ends_up_with_all_kv(filled: int, held: int, eager: bool, actions: list[str]) -> None:
    copy = MirrorCopy(filled, 40, 32, eager)
    target, chunks = min(held, filled), []

    def apply(event: machine.Event) -> None:
        for command in copy.handle(event):
            if isinstance(command, SendBlocks):
                chunks.append(command)
                assert command.position + command.tokens <= copy.filled
        if copy.state is not MirrorState.ENDED:
            copy.validate()

    def store_next() -> None:
        nonlocal target
        chunk = chunks.pop(0)
        if chunk.position <= target:
            target = chunk.position + chunk.tokens
        apply(machine.BlocksStored(target))

    apply(machine.OfferAccepted(held))
    for action in actions:
        if action.startswith("grow"):
            apply(machine.KvGrown(copy.filled + (1 if action == "grow" else 50)))
        elif action == "store" and chunks:
            store_next()
        elif action == "lose" and len(chunks) > 1:
            del chunks[0]
            apply(machine.BlocksStored(target))
        elif action == "eager":
            apply(machine.EagernessChanged(eager=True))
        elif action == "lazy":
            apply(machine.EagernessChanged(eager=False))
        elif action == "tick":
            apply(machine.TimePassed())
    if copy.state is MirrorState.ENDED:
        return
    apply(machine.EagernessChanged(eager=True))
    while chunks:
        store_next()
    if copy.state is not MirrorState.ENDED:
        assert target == copy.held == copy.filled
        assert copy.state is MirrorState.LEVEL
