"""The records that a deputy keeps: order of tokens, repeats, gaps, takeover, limits."""

import gc
import tracemalloc
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ids import peer_id
from in_process.journals import S, answer, named, record
from meshd.agents.session.journal.record import SessionRecord, decode_record, encode_record
from meshd.agents.session.journal.store import JournalStore, size_of
from meshd.errors import InvalidRequest, Overloaded
from meshd.protocol.messages import JournalTokens
from meshd.types import SamplingParams, SessionId, TokenLogprobs

C, D = peer_id("c"), peer_id("d")


def tokens_message(index: int, end: int, finish: str = "", *, epoch: int = 1, session: SessionId = S) -> JournalTokens:
    return JournalTokens(session=session, epoch=epoch, index=index, tokens=answer(end, index), finish=finish)


def kept(store: JournalStore, session: SessionId = S) -> SessionRecord:
    known = store.get(session)
    assert known is not None
    return known


@pytest.fixture
def store() -> JournalStore:
    started = JournalStore()
    started.keep(record(tokens=2), 0.0)
    return started


def test_tokens_follow_the_record_in_order(store: JournalStore) -> None:
    assert store.append(C, tokens_message(2, 5), 1.0)
    assert store.append(C, tokens_message(5, 6, "stop"), 2.0)
    assert kept(store) == record(tokens=6, finish="stop")
    store.validate()


@pytest.mark.parametrize(("index", "end", "have"), [(0, 2, 2), (1, 2, 2), (0, 4, 4), (1, 3, 3), (2, 2, 2)])
def test_of_repeated_tokens_only_the_new_ones_are_appended(store: JournalStore, index: int, end: int, have: int) -> None:
    assert store.append(C, tokens_message(index, end), 1.0)
    assert kept(store).tokens == answer(have)
    store.validate()


@pytest.mark.parametrize("index", [3, 100, -1])
def test_a_gap_is_refused_and_changes_nothing(store: JournalStore, index: int) -> None:
    message = JournalTokens(session=S, epoch=1, index=index, tokens=((7, None),), finish="stop")
    assert not store.append(C, message, 1.0)
    assert kept(store) == record(tokens=2)


def test_tokens_and_drops_of_unknown_sessions_or_from_strangers_are_refused(store: JournalStore) -> None:
    assert not store.append(C, tokens_message(0, 1, session=named("other")), 1.0)
    assert not store.append(D, tokens_message(2, 3), 1.0)
    assert not store.drop(S, D)
    assert kept(store) == record(tokens=2)
    assert store.drop(S, C)
    assert store.get(S) is None
    assert store.size == 0


def test_tokens_of_a_later_epoch_raise_it_and_those_of_an_older_one_are_ignored(store: JournalStore) -> None:
    assert store.append(C, tokens_message(2, 3, epoch=4), 1.0)
    assert kept(store).epoch == 4
    assert store.append(C, tokens_message(3, 9, epoch=3), 1.0)
    assert kept(store).tokens == answer(3)


def test_a_record_fills_gaps_and_never_removes_tokens_of_its_coordinator(store: JournalStore) -> None:
    store.keep(record(tokens=7), 1.0)
    assert kept(store).tokens == answer(7)
    store.keep(record(tokens=5, suspended=True), 2.0)
    assert kept(store) == record(tokens=7, suspended=True)
    store.keep(record(tokens=5, epoch=2), 3.0)
    assert kept(store) == record(tokens=7, epoch=2)
    store.keep(record(tokens=5, epoch=3, coordinator=D), 4.0)
    assert kept(store) == record(tokens=5, epoch=3, coordinator=D)
    store.validate()


def test_another_coordinator_needs_a_higher_epoch(store: JournalStore) -> None:
    with pytest.raises(InvalidRequest, match="is past"):
        store.keep(record(tokens=9, coordinator=D, epoch=1), 1.0)
    assert kept(store) == record(tokens=2)
    store.keep(record(tokens=1, coordinator=D, epoch=1001), 1.0)
    assert kept(store) == record(tokens=1, coordinator=D, epoch=1001)
    assert not store.append(C, tokens_message(1, 2), 1.0)
    with pytest.raises(InvalidRequest, match="is past"):
        store.keep(record(tokens=2), 1.0)
    store.validate()


def test_after_hand_to_only_the_new_coordinator_may_add(store: JournalStore) -> None:
    store.hand_to(S, D, 1.0)
    assert store.sessions_of(C) == []
    assert store.sessions_of(D) == [S]
    assert kept(store) == record(tokens=2, coordinator=D, coordinators=(C,))
    assert not store.append(C, tokens_message(2, 3), 1.0)
    with pytest.raises(InvalidRequest, match="is past"):
        store.keep(record(tokens=9), 1.0)


def test_an_ended_record_takes_no_more_tokens(store: JournalStore) -> None:
    assert store.append(C, tokens_message(2, 3, "length"), 1.0)
    assert store.append(C, tokens_message(2, 3, "length"), 1.0)
    assert not store.append(C, tokens_message(3, 4), 1.0)
    assert kept(store) == record(tokens=3, finish="length")


def test_a_client_can_end_or_forget_a_session_without_its_coordinator(store: JournalStore) -> None:
    assert store.end(S, "cancelled", 1.0)
    assert store.end(S, "stop", 2.0)
    assert kept(store).finish == "cancelled"
    assert not store.end(named("other"), "cancelled", 1.0)
    assert store.forget(S)
    assert not store.forget(S)


def test_a_record_with_store_false_is_deleted_at_its_end() -> None:
    store = JournalStore()
    store.keep(record(store=False), 0.0)
    assert store.append(C, tokens_message(0, 3, "stop"), 1.0)
    assert store.get(S) is None
    store.keep(record(store=False), 0.0)
    store.end(S, "cancelled", 1.0)
    store.keep(record(store=False, finish="stop"), 0.0)
    assert len(store) == store.size == 0


def test_records_are_kept_for_ten_minutes_after_their_last_change(store: JournalStore) -> None:
    store.keep(record(named("ended"), finish="stop"), 0.0)
    assert store.append(C, tokens_message(2, 2), 500.0)
    store.expire(601.0)
    assert store.get(named("ended")) is None
    assert store.get(S) is not None
    store.expire(1101.0)
    assert len(store) == store.size == 0


def _three(**bounds: int) -> JournalStore:
    """Make a store with the records of three sessions: a still runs, b ended at 2 s, and c ended at 1 s."""
    store = JournalStore(**bounds, share=1.0)
    store.keep(record(named("a"), tokens=10), 0.0)
    store.keep(record(named("b"), tokens=10, finish="stop"), 2.0)
    store.keep(record(named("c"), tokens=10, finish="stop"), 1.0)
    return store


def test_when_there_are_too_many_the_oldest_ended_one_is_deleted_first() -> None:
    store = _three(max_records=3)
    store.keep(record(named("d")), 3.0)
    assert store.get(named("c")) is None
    store.keep(record(named("e")), 3.0)
    assert store.get(named("b")) is None
    with pytest.raises(Overloaded):
        store.keep(record(named("f")), 3.0)
    assert [store.get(named(name)) is not None for name in "ade"] == [True] * 3
    store.validate()


def test_a_record_that_is_too_large_is_refused_and_none_is_deleted_for_it() -> None:
    size = size_of(record(tokens=10))
    store = _three(max_bytes=3 * size + 100)
    with pytest.raises(Overloaded):
        store.keep(record(named("d"), tokens=10_000), 3.0)
    assert len(store) == 3
    store.keep(record(named("d"), tokens=11), 3.0)
    assert {name for name in "abcd" if store.get(named(name))} == {"a", "b", "d"}
    store.validate()


def test_a_record_that_grows_too_large_is_deleted_and_the_tokens_are_refused() -> None:
    store = JournalStore(max_bytes=size_of(record(tokens=10)), share=1.0)
    store.keep(record(tokens=8), 0.0)
    assert store.append(C, tokens_message(8, 10), 1.0)
    assert not store.append(C, tokens_message(10, 11), 1.0)
    assert store.get(S) is None
    store.validate()


def test_a_replaced_record_frees_its_memory() -> None:
    store = JournalStore(max_records=1, max_bytes=size_of(record(tokens=10)), share=1.0)
    store.keep(record(tokens=9), 0.0)
    store.keep(record(tokens=10), 1.0)
    assert kept(store).tokens == answer(10)
    store.validate()


@pytest.mark.parametrize("top", [None, 0, 20])
def test_the_estimated_size_is_close_to_measured_memory(top: int | None) -> None:
    def one(index: int) -> tuple[int, TokenLogprobs | None]:
        chosen = -float(index) if index else -0.5
        likeliest = tuple((1000 + index + rank, -0.25 * rank - index) for rank in range(top or 0))
        return 1000 + index, None if top is None else TokenLogprobs(chosen, likeliest)

    whole = record(prompt=tuple(range(1000, 3000)), tokens=0)
    data = encode_record(msgspec.structs.replace(whole, tokens=tuple(one(index) for index in range(500))))
    store = JournalStore()
    tracemalloc.start()
    try:
        store.keep(decode_record(data), 0.0)
        gc.collect()  # empties the lists of freed tuples
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.7 * taken < store.size < 2.5 * taken


@given(st.data())
def test_the_tokens_are_a_prefix_of_the_answer_in_any_order_of_messages(data: st.DataObject) -> None:
    """Messages may be lost, repeated and reordered: the tokens kept are always a prefix, and a full record completes them."""
    store = JournalStore(max_records=3, max_bytes=20_000, share=1.0)
    store.keep(record(), 0.0)
    cuts = sorted(data.draw(st.sets(st.integers(1, 60), max_size=8)) | {0, 60})
    sent = [tokens_message(start, end, "stop" if end == 60 else "") for start, end in pairwise(cuts)]
    arriving = data.draw(st.lists(st.sampled_from(sent), max_size=30))
    before = 0
    for now, message in enumerate(arriving):
        appended = store.append(C, message, float(now))
        known = kept(store)
        assert known.tokens == answer(len(known.tokens))
        assert len(known.tokens) >= before
        assert appended == (message.index <= before)
        before = len(known.tokens)
        store.validate()
    store.keep(record(tokens=60, finish="stop"), 100.0)
    assert kept(store) == record(tokens=60, finish="stop")


def keep_many(store: JournalStore, count: int, **fields: Any) -> None:
    for number in range(count):
        store.keep(decode_record(encode_record(record(named(f"{number}"), **fields))), 0.0)


@pytest.mark.parametrize(
    "large",
    [
        {"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0))},
        {"stop": ("x" * 1000,) * 16},
        {"renderer": b"x" * 1_000_000},
        {"prompt": (70_000,) * 200_000},
    ],
    ids=["bias", "stops", "renderer", "prompt"],
)
def test_every_part_of_a_record_counts_with_its_bytes(large: dict[str, Any]) -> None:
    """A member sends records whose size is where nobody counts it."""
    data = encode_record(record(**large))
    gc.collect()
    store = JournalStore(max_bytes=4 * len(data), share=1.0)
    tracemalloc.start()
    try:
        with pytest.raises(Overloaded):
            keep_many(store, 10, **large)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    store.validate()
    assert taken < 1.5 * store.max_bytes


def test_one_coordinator_leaves_room_for_those_of_others() -> None:
    store = JournalStore(max_records=8, max_bytes=100_000)
    with pytest.raises(Overloaded):
        keep_many(store, 9)
    assert len(store) == 4
    store.keep(record(named("other"), coordinator=D), 0.0)
    with pytest.raises(Overloaded):
        store.keep(record(named("large"), coordinator=D, prompt=(70_000,) * 20_000), 0.0)
    assert not store.append(C, tokens_message(0, 30_000, session=named("1")), 1.0), "a record grows beyond the share"
    store.keep(record(named("2"), finish="stop"), 2.0)
    store.keep(record(named("new")), 3.0)
    store.keep(record(named("newer")), 3.0)
    assert store.get(named("2")) is None, "an ended one of the same coordinator makes room"
    store.validate()
