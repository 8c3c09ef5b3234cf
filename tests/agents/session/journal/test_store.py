"""What a deputy keeps: order, repeats, gaps, take-over, bounds."""

import tracemalloc
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.journals import S, answer, record
from meshd.agents.session.journal.record import SessionRecord, decode_record, encode_record
from meshd.agents.session.journal.store import JournalStore, size_of
from meshd.errors import InvalidRequest, Overloaded
from meshd.protocol.messages import JournalTokens
from meshd.types import PeerId, SessionId, TokenLogprobs

C, D = PeerId("c"), PeerId("d")


def told(index: int, end: int, finish: str = "", *, epoch: int = 1, session: SessionId = S) -> JournalTokens:
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
    assert store.append(C, told(2, 5), 1.0)
    assert store.append(C, told(5, 6, "stop"), 2.0)
    assert kept(store) == record(tokens=6, finish="stop")
    store.validate()


@pytest.mark.parametrize(("index", "end", "have"), [(0, 2, 2), (1, 2, 2), (0, 4, 4), (1, 3, 3), (2, 2, 2)])
def test_a_repeat_changes_nothing_but_what_is_new_in_it(store: JournalStore, index: int, end: int, have: int) -> None:
    assert store.append(C, told(index, end), 1.0)
    assert kept(store).tokens == answer(have)
    store.validate()


@pytest.mark.parametrize("index", [3, 100, -1])
def test_a_gap_is_refused_and_changes_nothing(store: JournalStore, index: int) -> None:
    message = JournalTokens(session=S, epoch=1, index=index, tokens=((7, None),), finish="stop")
    assert not store.append(C, message, 1.0)
    assert kept(store) == record(tokens=2)


def test_what_is_not_known_or_not_from_the_coordinator_is_refused(store: JournalStore) -> None:
    assert not store.append(C, told(0, 1, session=SessionId("other")), 1.0)
    assert not store.append(D, told(2, 3), 1.0)
    assert not store.drop(S, D)
    assert kept(store) == record(tokens=2)
    assert store.drop(S, C)
    assert store.get(S) is None
    assert store.size == 0


def test_a_later_epoch_is_known_and_an_older_one_counts_no_more(store: JournalStore) -> None:
    assert store.append(C, told(2, 3, epoch=4), 1.0)
    assert kept(store).epoch == 4
    assert store.append(C, told(3, 9, epoch=3), 1.0)
    assert kept(store).tokens == answer(3)


def test_the_whole_record_again_repairs_a_gap_and_never_takes_tokens_away(store: JournalStore) -> None:
    store.keep(record(tokens=7), 1.0)
    assert kept(store).tokens == answer(7)
    store.keep(record(tokens=5, suspended=True), 2.0)
    assert kept(store) == record(tokens=7, suspended=True)
    store.keep(record(tokens=5, epoch=2), 3.0)
    assert kept(store) == record(tokens=5, epoch=2)
    store.validate()


def test_another_coordinator_needs_a_higher_epoch(store: JournalStore) -> None:
    with pytest.raises(InvalidRequest, match="is past"):
        store.keep(record(tokens=9, coordinator=D, epoch=1), 1.0)
    assert kept(store) == record(tokens=2)
    store.keep(record(tokens=1, coordinator=D, epoch=1001), 1.0)
    assert kept(store) == record(tokens=1, coordinator=D, epoch=1001)
    assert not store.append(C, told(1, 2), 1.0)
    with pytest.raises(InvalidRequest, match="is past"):
        store.keep(record(tokens=2), 1.0)
    store.validate()


def test_who_takes_the_record_becomes_its_coordinator_here(store: JournalStore) -> None:
    store.hand_to(S, D, 1.0)
    assert store.records_of(C) == []
    assert store.records_of(D) == [record(tokens=2, coordinator=D)]
    assert not store.append(C, told(2, 3), 1.0)
    with pytest.raises(InvalidRequest, match="is past"):
        store.keep(record(tokens=9), 1.0)


def test_what_has_ended_takes_no_more(store: JournalStore) -> None:
    assert store.append(C, told(2, 3, "length"), 1.0)
    assert store.append(C, told(2, 3, "length"), 1.0)
    assert not store.append(C, told(3, 4), 1.0)
    assert kept(store) == record(tokens=3, finish="length")


def test_a_client_may_end_it_while_its_coordinator_is_away(store: JournalStore) -> None:
    assert store.end(S, "cancelled", 1.0)
    assert store.end(S, "stop", 2.0)
    assert kept(store).finish == "cancelled"
    assert not store.end(SessionId("other"), "cancelled", 1.0)
    assert store.forget(S)
    assert not store.forget(S)


def test_what_is_not_to_be_stored_goes_with_its_end() -> None:
    store = JournalStore()
    store.keep(record(store=False), 0.0)
    assert store.append(C, told(0, 3, "stop"), 1.0)
    assert store.get(S) is None
    store.keep(record(store=False), 0.0)
    store.end(S, "cancelled", 1.0)
    store.keep(record(store=False, finish="stop"), 0.0)
    assert len(store) == store.size == 0


def test_records_are_kept_for_ten_minutes_after_the_last_sign_of_life(store: JournalStore) -> None:
    store.keep(record(SessionId("ended"), finish="stop"), 0.0)
    assert store.append(C, told(2, 2), 500.0)
    store.expire(601.0)
    assert store.get(SessionId("ended")) is None
    assert store.get(S) is not None
    store.expire(1101.0)
    assert len(store) == store.size == 0


def _three(**bounds: int) -> JournalStore:
    """Two that have ended, the second one longer ago, and one that runs."""
    store = JournalStore(**bounds)
    store.keep(record(SessionId("a"), tokens=10), 0.0)
    store.keep(record(SessionId("b"), tokens=10, finish="stop"), 2.0)
    store.keep(record(SessionId("c"), tokens=10, finish="stop"), 1.0)
    return store


def test_when_there_are_too_many_the_oldest_ended_one_goes_first() -> None:
    store = _three(max_records=3)
    store.keep(record(SessionId("d")), 3.0)
    assert store.get(SessionId("c")) is None
    store.keep(record(SessionId("e")), 3.0)
    assert store.get(SessionId("b")) is None
    with pytest.raises(Overloaded):
        store.keep(record(SessionId("f")), 3.0)
    assert [store.get(SessionId(name)) is not None for name in "ade"] == [True] * 3
    store.validate()


def test_a_record_too_large_is_refused_and_nothing_is_dropped_for_it() -> None:
    size = size_of(record(tokens=10))
    store = _three(max_bytes=3 * size)
    with pytest.raises(Overloaded):
        store.keep(record(SessionId("d"), tokens=1000), 3.0)
    assert len(store) == 3
    store.keep(record(SessionId("d"), tokens=11), 3.0)
    assert {name for name in "abcd" if store.get(SessionId(name))} == {"a", "d"}
    store.validate()


def test_a_record_that_grows_too_large_is_given_up_and_its_coordinator_told() -> None:
    store = JournalStore(max_bytes=size_of(record(tokens=10)))
    store.keep(record(tokens=8), 0.0)
    assert store.append(C, told(8, 10), 1.0)
    assert not store.append(C, told(10, 11), 1.0)
    assert store.get(S) is None
    store.validate()


def test_a_replaced_record_gives_back_its_room() -> None:
    store = JournalStore(max_records=1, max_bytes=size_of(record(tokens=10)))
    store.keep(record(tokens=9), 0.0)
    store.keep(record(tokens=10), 1.0)
    assert kept(store).tokens == answer(10)
    store.validate()


@pytest.mark.parametrize("top", [None, 0, 20])
def test_the_account_is_about_what_python_takes(top: int | None) -> None:
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
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.7 * taken < store.size < 2.5 * taken


@given(st.data())
def test_whatever_the_network_does_the_tokens_are_the_first_of_the_answer(data: st.DataObject) -> None:
    """Batches may be lost, repeated and swapped: what is kept is always true, and the whole record mends it."""
    store = JournalStore(max_records=3, max_bytes=20_000)
    store.keep(record(), 0.0)
    cuts = sorted(data.draw(st.sets(st.integers(1, 60), max_size=8)) | {0, 60})
    sent = [told(start, end, "stop" if end == 60 else "") for start, end in pairwise(cuts)]
    arriving = data.draw(st.lists(st.sampled_from(sent), max_size=30))
    before = 0
    for now, message in enumerate(arriving):
        whole = store.append(C, message, float(now))
        known = kept(store)
        assert known.tokens == answer(len(known.tokens))
        assert len(known.tokens) >= before
        assert whole == (message.index <= before)
        before = len(known.tokens)
        store.validate()
    store.keep(record(tokens=60, finish="stop"), 100.0)
    assert kept(store) == record(tokens=60, finish="stop")
