"""The locator, over real links: which peer has a session, and how another peer becomes its coordinator."""

import asyncio

import pytest

from ids import peer_id
from in_process.journals import SECRET, Keeper, Keepers, S, named, record, secret
from in_process.peers import QUICK, Peers
from meshd.agents.session.journal.record import SessionRecord
from meshd.errors import RemoteFailure, UnknownSession
from meshd.protocol.messages import FetchSession, FindSession, SessionFound
from meshd.types import PeerId, SessionId


@pytest.fixture
def keepers(peers: Peers) -> Keepers:
    return Keepers(peers)


def keep(keeper: Keeper, coordinator: PeerId, **fields: object) -> None:
    """Store a record at a peer, as if it were a deputy of the coordinator."""
    keeper.deputy.store.keep(record(coordinator=coordinator, **fields), keeper.clock.now)  # type: ignore[arg-type]


async def test_a_running_session_is_taken_from_its_coordinator_which_releases_it(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, _, c):
        session = a.answer(tokens=5)
        await keepers.until(lambda: a.writer.deputy_of(S) is not None)
        session.make(3)
        assert await c.locator.coordinator_of(S) == a.id
        assert await c.locator.fetch(SECRET, take=False) == session.record
        assert a.released == []
        assert await c.locator.fetch(SECRET, take=True) == session.record
        assert a.released == [S]
        with pytest.raises(UnknownSession):
            await c.locator.coordinator_of(S)


async def test_without_its_coordinator_the_record_with_most_tokens_is_fetched(keepers: Keepers) -> None:
    other = named("07")
    async with keepers.linked("a", "b", "c", "d") as (a, b, c, d):
        for session, less, more in ((S, b, c), (other, c, b)):
            keep(less, a.id, session=session, tokens=3)
            keep(more, a.id, session=session, tokens=5)
        await a.peer.links.close("it goes")
        await keepers.until(lambda: a.id not in d.peer.links.peers())
        for session, keeper in ((S, c), (other, b)):
            assert len((await d.locator.fetch(secret(session), take=True)).tokens) == 5
            known = keeper.deputy.record(session)
            assert known is not None
            assert known.coordinator == d.id


async def test_a_record_of_a_later_epoch_ranks_above_a_coordinator_of_an_earlier_one(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.answer(tokens=9, epoch=1)
        keep(b, peer_id("x"), tokens=4, epoch=1001)
        await keepers.until(lambda: a.writer.deputy_of(S) is not None)
        taken = await c.locator.fetch(SECRET, take=True)
        assert (taken.epoch, len(taken.tokens)) == (1001, 4)
        assert a.released == []


async def test_the_record_on_this_peer_is_used_unless_another_has_more_tokens(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        keep(a, peer_id("x"), tokens=2)
        assert len((await a.locator.fetch(SECRET, take=True)).tokens) == 2
        keep(b, peer_id("x"), tokens=3)
        assert len((await a.locator.fetch(SECRET, take=True)).tokens) == 3


async def test_a_session_without_any_record_is_unknown(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, _):
        with pytest.raises(UnknownSession):
            await a.locator.fetch(SECRET, take=True)
        with pytest.raises(UnknownSession):
            await a.locator.end(S, forget=True)


async def test_the_next_best_record_is_fetched_when_the_best_peer_is_lost_meanwhile(
    keepers: Keepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        keep(b, peer_id("x"), tokens=3)
        asked: list[SessionId] = []

        def dying(session: SessionId) -> SessionRecord:
            asked.append(session)
            if len(asked) == 2:
                for link in a.peer.links._table:
                    link.end("it dies")
            return record(coordinator=a.id, tokens=7)

        monkeypatch.setattr(a, "own", dying)
        assert len((await c.locator.fetch(SECRET, take=False)).tokens) == 3
        assert len(asked) == 2


async def test_silent_peers_are_not_waited_for_once_the_coordinator_has_replied(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        a.answer(tokens=1)
        silent = keepers.peers.start("silent")
        hanging = asyncio.Event()

        async def never(sender: PeerId, message: FindSession, payload: memoryview) -> None:
            await hanging.wait()

        silent.links.register(FindSession, never)
        b.peer.dial(silent)
        await keepers.until(lambda: silent.id in b.peer.links.peers())
        async with asyncio.timeout(1.5):
            assert len((await b.locator.fetch(SECRET, take=False)).tokens) == 1
        hanging.set()


async def test_the_deputy_with_most_tokens_takes_an_orphan_over(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c", timing=QUICK) as (a, b, c):
        keep(b, a.id, tokens=5)
        keep(c, a.id, tokens=3)
        await a.peer.links.close("it goes")
        await keepers.until(lambda: bool(b.orphans and c.orphans))
        assert await b.locator.should_take_over(*b.orphans[0])
        assert not await c.locator.should_take_over(*c.orphans[0])


async def test_of_deputies_with_equal_records_exactly_one_takes_over(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        record(coordinator=peer_id("x"), tokens=3)
        for keeper in (a, b, c):
            keep(keeper, peer_id("x"), tokens=3)
        assert sorted([await keeper.locator.should_take_over(S, peer_id("x")) for keeper in (a, b, c)]) == [False, False, True]


async def test_no_takeover_of_a_session_that_runs_elsewhere_has_ended_or_was_taken(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        record(coordinator=peer_id("x"), tokens=3)
        keep(b, peer_id("x"), tokens=3)
        assert await b.locator.should_take_over(S, peer_id("x"))
        a.answer(tokens=3, epoch=1001)
        assert not await b.locator.should_take_over(S, peer_id("x"))
        del a.answers[S]
        b.deputy.hand_to(S, a.id)
        assert not await b.locator.should_take_over(S, peer_id("x"))
        b.deputy.forget(S)
        assert not await b.locator.should_take_over(S, peer_id("x"))
        keep(b, peer_id("x"), tokens=3, finish="stop")
        assert not await b.locator.should_take_over(S, peer_id("x"))


async def test_ending_reaches_the_coordinator_and_every_record(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        a.answer(tokens=2)
        await keepers.until(lambda: a.writer.deputy_of(S) is not None)
        await c.locator.end(S, forget=False)
        assert a.ended == [(S, False)]
        kept = [keeper.deputy.record(S) for keeper in (b, c) if keeper.deputy.record(S) is not None]
        assert [known.finish for known in kept if known is not None] == ["cancelled"]
        await c.locator.end(S, forget=True)
        assert a.ended[-1] == (S, True)
        assert b.deputy.record(S) is None
        assert c.deputy.record(S) is None


async def test_an_orphan_can_be_ended_too(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        keep(b, peer_id("x"), tokens=2)
        await a.locator.end(S, forget=False)
        known = b.deputy.record(S)
        assert known is not None
        assert known.finish == "cancelled"


async def test_a_reply_to_find_session_describes_the_latest_record_here(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):

        async def found() -> tuple[bool, bool, int, int]:
            reply, _ = await b.peer.links.request(
                a.id, lambda number: FindSession(request=number, session=S, nonce="n"), timeout_s=5
            )
            assert isinstance(reply, SessionFound)
            return reply.coordinates, reply.keeps, reply.epoch, reply.tokens

        assert await found() == (False, False, 0, 0)
        keep(a, peer_id("x"), tokens=4, epoch=2)
        assert await found() == (False, True, 2, 4)
        a.answer(tokens=6, epoch=3)
        assert await found() == (True, False, 3, 6)
        keep(a, peer_id("y"), tokens=5, epoch=1003)
        assert await found() == (False, True, 1003, 5)
        _, payload = await b.peer.links.request(
            a.id, lambda number: FetchSession(request=number, session=S, secret=SECRET, take=True), timeout_s=5
        )
        assert payload
        assert a.released == []


async def test_a_record_is_given_only_to_a_peer_with_the_secret_of_the_answers_id(keepers: Keepers) -> None:
    """Stages, deputies and every peer that was asked for the session know its id; its client alone has the answer's id."""
    async with keepers.linked("a", "b") as (a, b):
        session = a.answer(tokens=6)
        await keepers.until(lambda: b.kept() == 6)
        for wrong in (S, session.record.key, "", "f" * 32):
            for holder, asker in ((a, b), (b, a)):
                for take in (False, True):
                    request = FetchSession(request=asker.peer.links.next_request(), session=S, secret=wrong, take=take)
                    with pytest.raises(RemoteFailure, match="a client sent the answer's id"):
                        await asker.peer.links.request(holder.id, request, timeout_s=5)
        assert a.released == []


@pytest.mark.parametrize("how", ["no proof", "any proof", "the coordinator's proof"])
async def test_a_peer_without_the_record_cannot_pretend_to_have_it(keepers: Keepers, how: str) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        forger = keepers.peers.start("forger")

        async def pretend(sender: PeerId, message: FindSession, payload: memoryview) -> SessionFound:
            proof = "0" * 64 if how == "any proof" else ""
            if how == "the coordinator's proof":
                relayed, _ = await forger.links.request(
                    b.id, lambda number: FindSession(request=number, session=S, nonce=message.nonce), timeout_s=5
                )
                assert isinstance(relayed, SessionFound)
                proof = relayed.proof
            return SessionFound(request=message.request, coordinates=True, keeps=False, epoch=10**6, tokens=99, proof=proof)

        forger.links.register(FindSession, pretend)
        for keeper in (b, c):
            keeper.peer.dial(forger)
        await keepers.until(lambda: all(forger.id in keeper.peer.links.peers() for keeper in (b, c)))
        keep(b, peer_id("x"), tokens=3)
        assert (await c.locator.fetch(SECRET, take=False)).coordinator == peer_id("x")
        known = b.deputy.record(S)
        assert known is not None
        assert await c.locator.other_coordinator(known) is None
        assert await b.locator.should_take_over(S, peer_id("x"))
        assert a.orphans == []
