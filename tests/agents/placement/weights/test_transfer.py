"""The transfer of one range: every row of its transition table, illegal events and stale events."""

import pytest

from meshd.agents.machine import IllegalTransition
from meshd.agents.placement.weights.transfer import (
    CHUNK_BYTES,
    TRANSITIONS,
    BanSource,
    CheckRange,
    ChunkArrived,
    ChunkAsked,
    ChunkRefused,
    ChunkWritten,
    Event,
    FileRange,
    RangeCorrupt,
    RangeTransfer,
    RangeVerified,
    SourceLeft,
    TransferState,
)
from meshd.types import PeerId

A, B = PeerId("a"), PeerId("b")


def transfer_of(chunks: int) -> RangeTransfer:
    return RangeTransfer(0, FileRange((0,), 100, (chunks - 1) * CHUNK_BYTES + 5))


def apply(transfer: RangeTransfer, *events: Event) -> list[object]:
    """Apply events in order. Returns: the commands that the last event caused."""
    commands: list[object] = []
    for event in events:
        commands = list(transfer.handle(event))
        transfer.validate()
    return commands


def fetch(transfer: RangeTransfer, source: PeerId) -> list[object]:
    """Ask a source for the next chunk, receive it and write it."""
    chunk = transfer.todo[0]
    return apply(transfer, ChunkAsked(chunk, source, 0.0, owns=True), ChunkArrived(chunk, source), ChunkWritten())


def in_state(state: TransferState) -> RangeTransfer:
    transfer = transfer_of(1)
    if state is TransferState.COMING:
        apply(transfer, ChunkAsked(transfer.todo[0], A, 0.0))
    elif state in (TransferState.CHECKING, TransferState.HERE):
        fetch(transfer, A)
    if state is TransferState.HERE:
        apply(transfer, RangeVerified())
    assert transfer.state is state
    return transfer


@pytest.mark.parametrize("state", TransferState)
def test_an_event_outside_the_table_raises_and_changes_nothing(state: TransferState) -> None:
    chunk = transfer_of(1).todo[0]
    for event in (ChunkAsked(chunk, A, 0.0), ChunkWritten(), SourceLeft(A, False), RangeVerified(), RangeCorrupt()):
        transfer = in_state(state)
        before = repr(transfer)
        if (state, type(event)) not in TRANSITIONS:
            with pytest.raises(IllegalTransition, match=f"transfer of range 0: {type(event).__name__} in state {state.value}"):
                transfer.handle(event)
            assert repr(transfer) == before


def test_the_check_follows_the_write_of_the_last_chunk() -> None:
    transfer = transfer_of(2)
    assert fetch(transfer, A) == []
    assert fetch(transfer, B) == [CheckRange()]
    assert apply(transfer, RangeVerified()) == []
    assert [str(change) for change in transfer.story] == [
        "wanted -ChunkAsked-> coming",
        "coming -ChunkWritten-> checking",
        "checking -RangeVerified-> here",
    ]


def test_a_second_answer_to_the_same_chunk_is_dropped() -> None:
    transfer = transfer_of(2)
    chunk = transfer.todo[0]
    apply(transfer, ChunkAsked(chunk, A, 0.0), ChunkAsked(chunk, B, 2.0), ChunkArrived(chunk, B), ChunkArrived(chunk, A))
    assert transfer.senders == {B}
    assert transfer.writing == 1


def test_a_chunk_is_wanted_again_only_when_every_source_refused_it() -> None:
    transfer = transfer_of(1)
    chunk = transfer.todo[0]
    apply(transfer, ChunkAsked(chunk, A, 0.0), ChunkAsked(chunk, B, 2.0), ChunkRefused(chunk, A))
    assert not transfer.todo
    apply(transfer, ChunkRefused(chunk, B), ChunkRefused(chunk, B))
    assert list(transfer.todo) == [chunk]


def test_a_corrupt_range_bans_its_sender_only_if_there_was_one() -> None:
    transfer = transfer_of(2)
    fetch(transfer, A)
    fetch(transfer, B)
    assert apply(transfer, RangeCorrupt()) == []
    assert transfer.alone
    fetch(transfer, A)
    fetch(transfer, A)
    assert apply(transfer, RangeCorrupt()) == [BanSource(A)]
    assert transfer.round == 2


def test_a_range_that_must_come_from_one_source_is_wanted_again_when_that_source_leaves() -> None:
    transfer = transfer_of(2)
    transfer.alone = True
    fetch(transfer, A)
    apply(transfer, SourceLeft(A, banned=False))
    assert transfer.state is TransferState.WANTED
    assert len(transfer.todo) == 2


def test_chunks_of_an_honest_source_that_leaves_are_kept() -> None:
    transfer = transfer_of(2)
    fetch(transfer, A)
    apply(transfer, SourceLeft(A, banned=False))
    assert (transfer.state, transfer.written, transfer.owner) == (TransferState.COMING, 1, None)


def test_a_range_restarts_only_when_its_last_write_is_done() -> None:
    transfer = transfer_of(2)
    one, other = transfer.todo
    apply(transfer, ChunkAsked(one, A, 0.0), ChunkAsked(other, A, 0.0), ChunkArrived(one, A), ChunkArrived(other, A))
    apply(transfer, SourceLeft(A, banned=True), ChunkWritten())
    assert (transfer.state, transfer.restarting) == (TransferState.COMING, True)
    apply(transfer, ChunkWritten())
    assert (transfer.state, transfer.restarting, transfer.round) == (TransferState.WANTED, False, 1)
