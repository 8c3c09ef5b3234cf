"""The deputy, over real links: from which peers it takes records, how long it keeps them, and when it reports orphans."""

import pytest

from in_process.journals import Keeper, Keepers, S, named, record
from in_process.peers import Peers
from meshd.agents.session.journal.record import encode_record
from meshd.errors import RemoteFailure
from meshd.protocol.messages import HandOver, Journal, JournalDrop, JournalTokens
from meshd.types import SessionId


@pytest.fixture
def keepers(peers: Peers) -> Keepers:
    return Keepers(peers)


async def test_all_answers_of_a_lost_coordinator_are_orphans_even_ended_ones(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        running, ended = a.answer(tokens=3), a.answer(named("ended"))
        ended.end()
        await keepers.until(lambda: [bool(known.finish) for known in b.deputy.store._records.values()] == [False, True])
        await a.peer.links.close("it goes")
        await keepers.until(lambda: len(b.orphans) == 2)
        assert b.orphans == [(S, a.id), (named("ended"), a.id)]
        assert b.deputy.record(S) == running.record


async def test_only_a_records_own_coordinator_may_send_it(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        known = record(coordinator=a.id, tokens=2)

        async def journal(sender: Keeper, payload: bytes, session: SessionId = S) -> None:
            await sender.peer.links.request(
                b.id, lambda number: Journal(request=number, session=session, epoch=1), payload, timeout_s=5
            )

        for payload in (encode_record(known), b"torn", b"\0" * (9 * 2**20)):
            with pytest.raises(RemoteFailure):
                await journal(c, payload)
        with pytest.raises(RemoteFailure):
            await journal(a, encode_record(known), named("other"))
        await journal(a, encode_record(known))
        await journal(a, encode_record(known))
        c.peer.links.send(b.id, JournalTokens(session=S, epoch=1, index=2, tokens=((9, None),), finish="stop"))
        c.peer.links.send(b.id, JournalDrop(session=S, epoch=1))
        with pytest.raises(RemoteFailure):
            await journal(c, encode_record(record(coordinator=c.id, tokens=2)))
        assert b.deputy.record(S) == known


async def test_a_record_that_does_not_change_expires(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        a.answer()
        await keepers.until(lambda: b.kept() == 0)
        await a.peer.links.close("it goes")
        await keepers.until(lambda: bool(b.orphans))
        await keepers.clock.move(610.0)
        assert b.kept() is None


async def test_another_peer_replaces_a_record_only_when_its_coordinator_is_gone_or_hands_it_over(keepers: Keepers) -> None:
    """A deputy has the record and its key, and sends it on with tokens of its own, under a higher epoch."""
    async with keepers.linked("a", "b", "c") as (a, b, c):
        known = record(coordinator=a.id, tokens=2)
        poisoned = record(coordinator=c.id, tokens=5, epoch=5000)

        async def journal(sender: Keeper, payload: bytes, epoch: int) -> None:
            await sender.peer.links.request(
                b.id, lambda number: Journal(request=number, session=S, epoch=epoch), payload, timeout_s=5
            )

        await journal(a, encode_record(known), 1)
        with pytest.raises(RemoteFailure, match="coordinator that is alive"):
            await journal(c, encode_record(poisoned), 5000)
        assert b.deputy.record(S) == known
        hand_over = HandOver(request=1, session=S, to=c.id)
        assert not b.deputy.on_hand_over(c.id, hand_over)
        assert b.deputy.on_hand_over(a.id, hand_over)
        await journal(c, encode_record(poisoned), 5000)
        assert b.deputy.record(S) == poisoned


async def test_no_peer_gives_a_coordinator_a_record_of_its_own_session(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        a.answer(tokens=2)
        forged = encode_record(record(coordinator=b.id, tokens=5, epoch=5000))
        with pytest.raises(RemoteFailure, match="coordinated by this peer"):
            await b.peer.links.request(a.id, lambda number: Journal(request=number, session=S, epoch=5000), forged, timeout_s=5)
