"""The coordinator's side of the journal, with deputies over real links."""

import asyncio

import msgspec
import pytest

from ids import peer_id
from in_process.journals import Answer, HandClock, Keeper, Keepers, S, advert, named, record
from in_process.peers import Peers
from meshd.agents.session.journal import writer
from meshd.agents.session.journal.deputy import MAX_RECORD_BYTES
from meshd.agents.session.journal.record import encode_record
from meshd.agents.session.journal.store import size_of
from meshd.agents.session.journal.writer import BATCH_TOKENS, JournalWriter, choose_deputy
from meshd.protocol.messages import Journal, JournalDrop, Journaled
from meshd.types import Advert, PeerId, SessionId, TokenLogprobs

ME, NEAR, FAR, STAGE = (peer_id(name) for name in ("me", "near", "far", "stage"))
RTT_S = {NEAR: 0.001, FAR: 0.1, STAGE: 0.0001}


@pytest.fixture
def keepers(peers: Peers) -> Keepers:
    return Keepers(peers)


def others(*names: PeerId, draining: PeerId | None = None) -> list[Advert]:
    return [advert(ME, RTT_S), *(advert(name, draining=name == draining) for name in names)]


def test_the_deputy_is_outside_the_plan_then_near() -> None:
    assert choose_deputy(ME, others(STAGE, FAR, NEAR), (ME, STAGE), ()) == NEAR
    assert choose_deputy(ME, others(STAGE, FAR), (ME, STAGE), ()) == FAR
    assert choose_deputy(ME, others(STAGE), (ME, STAGE), ()) == STAGE
    assert choose_deputy(ME, others(), (ME,), ()) is None


def test_a_peer_that_leaves_or_refused_is_not_chosen() -> None:
    assert choose_deputy(ME, others(FAR, NEAR, draining=NEAR), (), ()) == FAR
    assert choose_deputy(ME, others(FAR, NEAR), (), {NEAR}) == FAR
    assert choose_deputy(ME, others(NEAR), (), {NEAR}) is None


def test_the_present_deputy_is_kept_unless_it_joins_the_plan_or_leaves() -> None:
    assert choose_deputy(ME, others(FAR, NEAR), (), (), FAR) == FAR
    assert choose_deputy(ME, others(FAR, NEAR), (FAR,), (), FAR) == NEAR
    assert choose_deputy(ME, others(FAR, NEAR, draining=FAR), (), (), FAR) == NEAR


async def test_the_record_goes_to_one_deputy_and_its_tokens_follow_in_batches(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.1, c.id: 0.001}
        session = a.answer(tokens=2)
        await keepers.until(lambda: c.kept() == 2)
        assert a.writer.deputy_of(S) == c.id
        assert b.kept() is None
        session.make(BATCH_TOKENS - 1)
        await keepers.clock.move(0.1)
        assert c.kept() == 2
        session.make(1)
        await keepers.until(lambda: c.kept() == 2 + BATCH_TOKENS)
        session.make(3)
        await keepers.clock.move(0.25)
        await keepers.until(lambda: c.kept() == 5 + BATCH_TOKENS)
        session.make(1)
        session.end("length")
        await keepers.until(lambda: c.deputy.record(S) == session.record)


async def test_tokens_made_while_the_record_is_in_transit_are_not_lost(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer()
        session.make(5)
        await keepers.clock.move(0)
        session.make(300)
        session.end()
        await keepers.until(lambda: b.deputy.record(S) == session.record)


async def test_a_lost_deputy_is_replaced_at_once_and_the_new_one_gets_the_full_record(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        session = a.answer()
        await keepers.until(lambda: a.writer.deputy_of(S) == b.id)
        session.make(7)
        await b.peer.links.close("it goes")
        await keepers.until(lambda: c.kept() == 7)
        session.make(BATCH_TOKENS)
        await keepers.until(lambda: c.kept() == 7 + BATCH_TOKENS)


async def test_without_any_other_peer_the_writer_waits_for_one(peers: Peers) -> None:
    clock = HandClock()
    a = Keeper(peers.start("a"), clock)
    life = asyncio.create_task(a.live())
    session = a.answer()
    session.make(40)
    await clock.move(5.0)
    assert a.writer.deputy_of(S) is None
    b = Keeper(peers.start("b"), clock)
    a.peer.dial(b.peer)
    await a.peer.next_up()
    await clock.move(1.25)
    await Keepers(peers).until(lambda: b.kept() == 40)
    life.cancel()
    await asyncio.gather(life, return_exceptions=True)


async def test_after_a_gap_the_full_record_is_sent_again(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer(tokens=2)
        await keepers.until(lambda: b.kept() == 2)
        b.deputy.store.forget(S)
        session.make(BATCH_TOKENS)
        await keepers.until(lambda: a.writer.deputy_of(S) is None)
        await keepers.clock.move(2.25)
        await keepers.until(lambda: b.kept() == 2 + BATCH_TOKENS)


async def test_a_peer_that_refuses_is_not_asked_again_for_a_while(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        b.deputy.store.max_records = 0
        a.answer()
        await keepers.until(lambda: a.writer.deputy_of(S) == c.id)
        b.deputy.store.max_records = 256
        await c.peer.links.close("it goes")
        await keepers.until(lambda: a.writer.deputy_of(S) is None)
        await keepers.clock.move(5.0)
        assert b.kept() is None
        await keepers.clock.move(6.0)
        await keepers.until(lambda: b.kept() == 0)


async def test_a_new_plan_keeps_the_deputy_unless_it_has_a_stage(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        session = a.answer()
        await keepers.until(lambda: b.kept() == 0)
        session.make(3)
        session.replan(a.id)
        await keepers.until(lambda: b.kept() == 3)
        known = b.deputy.record(S)
        assert known is not None
        assert known.epoch == 2
        session.replan(a.id, b.id)
        await keepers.until(lambda: c.kept() == 3)
        await keepers.clock.move(11.0)
        await keepers.until(lambda: b.kept() is None)
        session.make(BATCH_TOKENS)
        await keepers.until(lambda: c.kept() == 3 + BATCH_TOKENS)


async def test_a_leaving_deputy_is_replaced_before_it_drops_the_record(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        a.answer(tokens=4)
        await keepers.until(lambda: b.kept() == 4)
        a.draining.add(b.id)
        await keepers.clock.move(1.25)
        await keepers.until(lambda: c.kept() == 4)
        assert b.kept() == 4
        await keepers.clock.move(11.0)
        await keepers.until(lambda: b.kept() is None)
        a.draining.add(c.id)
        await keepers.clock.move(5.0)
        assert c.kept() == 4


async def test_an_answer_that_is_not_kept_is_deleted_at_the_deputy_too(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer()
        await keepers.until(lambda: b.kept() == 0)
        session.end(keep=False)
        await keepers.until(lambda: b.kept() is None)
        assert len(a.writer) == 0
        at_once = a.answer(named("short"))
        await keepers.clock.move(0)
        at_once.end(keep=False)
        await keepers.clock.move(0)
        await keepers.until(lambda: b.kept(named("short")) is None and len(b.deputy.store) == 0)


async def test_a_suspended_answer_stays_unfinished_and_can_continue(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer()
        await keepers.until(lambda: b.kept() == 0)
        session.make(3)
        session.end("")
        await keepers.until(lambda: b.kept() == 3)
        assert b.deputy.record(S) == session.record
        for _ in range(15):
            await keepers.clock.move(60.0)
            await keepers.until(lambda: a.writer.deputy_of(S) == b.id)
        assert b.kept() == 3
        session.replan(a.id)
        session.make(BATCH_TOKENS)
        session.end()
        await keepers.until(lambda: b.deputy.record(S) == session.record)


async def test_ended_answers_get_new_deputies_for_ten_minutes(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        session = a.answer()
        session.end()
        await keepers.until(lambda: b.deputy.record(S) == session.record)
        await b.peer.links.close("it goes")
        await keepers.until(lambda: c.deputy.record(S) == session.record)
        await keepers.clock.move(700.0)
        assert len(a.writer) == 0
        assert c.kept() is None


async def test_the_record_of_an_answer_that_another_peer_took_over_is_deleted_a_minute_later(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        a.answer(tokens=3)
        await keepers.until(lambda: b.kept() == 3)
        a.writer.release(S)
        await keepers.clock.move(30.0)
        assert b.kept() == 3
        await keepers.clock.move(31.0)
        await keepers.until(lambda: b.kept() is None)


async def test_an_answer_that_comes_back_keeps_its_record(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer(tokens=3)
        await keepers.until(lambda: b.kept() == 3)
        a.writer.release(S)
        await keepers.clock.move(30.0)
        session.make(2)
        session.replan(a.id)
        await keepers.until(lambda: b.kept() == 5)
        await keepers.clock.move(90.0)
        session.make(BATCH_TOKENS)
        await keepers.until(lambda: b.kept() == 5 + BATCH_TOKENS)


async def test_a_peer_that_confirms_a_record_too_late_is_sent_a_drop(keepers: Keepers) -> None:
    async with keepers.linked("a") as (a,):
        slow = keepers.peers.start("slow")
        heard: list[str] = []
        kept = asyncio.Event()

        async def on_journal(sender: PeerId, message: Journal, payload: memoryview) -> Journaled:
            heard.append("journal")
            await kept.wait()
            heard.append("kept")
            return Journaled(request=message.request, session=message.session)

        slow.links.register(Journal, on_journal)
        slow.links.register(JournalDrop, lambda sender, message, payload: heard.append("drop"))
        a.peer.dial(slow)
        await keepers.until(lambda: slow.id in a.peer.links.peers())
        session = a.answer()
        await keepers.until(lambda: heard == ["journal"])
        session.end(keep=False)
        await keepers.until(lambda: heard == ["journal", "drop"])
        kept.set()
        await keepers.until(lambda: heard == ["journal", "drop", "kept", "drop"])


async def test_a_hundred_sessions_change_their_deputy_at_once(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        running: list[Answer] = [a.answer(named(f"{number}"), tokens=number) for number in range(100)]
        await keepers.until(lambda: len(b.deputy.store) == 100)
        await b.peer.links.close("it goes")
        for session in running:
            session.make(2)
        await keepers.clock.move(0.25)
        await keepers.until(lambda: len(c.deputy.store) == 100)
        await keepers.clock.move(0.25)
        await keepers.until(lambda: all(c.deputy.record(session.record.session) == session.record for session in running))


async def test_a_second_deputy_is_another_peer(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        running = a.answer(tokens=1)
        await keepers.until(lambda: a.writer.deputy_of(S) is not None)

        def chosen_by_the_first(session: SessionId) -> list[PeerId]:
            chosen = a.writer.chosen_for(session)
            return [chosen] if chosen is not None else []

        second = JournalWriter(a.id, a.peer.links, keepers.clock, a._adverts, chosen_by_the_first)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(second.run())
            second.begin(S, lambda: running.record, lambda: ())
            await keepers.until(lambda: second.deputy_of(S) is not None)
            task.cancel()
        assert {a.writer.deputy_of(S), second.deputy_of(S)} == {b.id, c.id}


async def test_a_deputy_without_room_is_replaced(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.rtt_s = {b.id: 0.001, c.id: 0.1}
        session = a.answer()
        await keepers.until(lambda: b.kept() == 0)
        b.deputy.store.max_bytes, b.deputy.store.share = size_of(record(tokens=10)), 1.0
        session.make(BATCH_TOKENS)
        await keepers.until(lambda: c.kept() == BATCH_TOKENS)
        assert b.kept() is None
        assert b.deputy.store.size == 0


async def test_an_answer_of_many_megabytes_is_kept_by_small_messages(
    keepers: Keepers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 20 logprobs a token, a record of 27,000 tokens is over the 8 MiB that a deputy takes at once."""
    top = tuple((200_000 + rank, -1.5 * rank) for rank in range(20))
    tokens = tuple((100 + index % 1000, TokenLogprobs(-0.5, top)) for index in range(27_000))
    async with keepers.linked("a", "b") as (a, b):
        large = a.answer()
        large.record = msgspec.structs.replace(large.record, tokens=tokens)
        assert len(encode_record(large.record)) > MAX_RECORD_BYTES - 2**20
        sizes: list[int] = []
        request = a.peer.links.request

        async def measured(peer: PeerId, message: object, payload: bytes | None = None, *, timeout_s: float) -> object:
            sizes.append(len(payload or b""))
            return await request(peer, message, payload, timeout_s=timeout_s)  # type: ignore[arg-type]

        monkeypatch.setattr(a.peer.links, "request", measured)
        large.replan()
        await keepers.until(lambda: bool(sizes) and a.writer.deputy_of(S) == b.id)
        large.end()
        for _ in range(40):
            await keepers.clock.move(0.25)
        await keepers.until(lambda: b.deputy.record(S) == large.record)
        assert max(sizes) < 2 * 2**20
        assert not [line for line in caplog.records if line.levelname == "WARNING"]


async def test_of_an_answer_that_is_too_long_the_first_part_is_kept_with_one_warning(
    keepers: Keepers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_TOKENS_BYTES", 7 * 50)
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer(tokens=3)
        await keepers.until(lambda: b.kept() == 3)
        for _ in range(10):
            session.make(20)
            await keepers.clock.move(0.25)
        await keepers.until(lambda: b.kept() == 50)
        session.end()
        for _ in range(10):
            await keepers.clock.move(1.0)
        assert b.kept() == 50
        kept = b.deputy.record(S)
        assert kept is not None
        assert kept.finish == "", "the heir computes the rest again"
        assert [line.getMessage() for line in caplog.records if line.levelname == "WARNING"] == [
            f"session {S}: its deputies keep its first 50 tokens; after a loss the rest is computed again"
        ]


async def test_a_record_that_no_deputy_takes_is_tried_once(keepers: Keepers, caplog: pytest.LogCaptureFixture) -> None:
    async with keepers.linked("a", "b") as (a, b):
        a.answer(renderer=b"x" * (9 * 2**20))
        for _ in range(5):
            await keepers.clock.move(1.0)
        assert b.kept() is None
        [warning] = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
        assert "no other peer keeps its record" in warning
