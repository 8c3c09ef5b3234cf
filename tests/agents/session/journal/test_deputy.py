"""The deputy, over real links: from which peers it takes records, how long it keeps them, and when it reports orphans."""

import pytest

from ids import session_id
from in_process.journals import Keeper, Keepers, S, record
from in_process.peers import Peers
from meshd.agents.session.journal.record import encode_record
from meshd.errors import RemoteFailure
from meshd.protocol.messages import Journal, JournalDrop, JournalTokens
from meshd.types import SessionId


@pytest.fixture
def keepers(peers: Peers) -> Keepers:
    return Keepers(peers)


async def test_all_answers_of_a_lost_coordinator_are_orphans_even_ended_ones(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        running, ended = a.answer(tokens=3), a.answer(session_id("ended"))
        ended.end()
        await keepers.until(lambda: [bool(known.finish) for known in b.deputy.store.records_of(a.id)] == [False, True])
        await a.peer.links.close("it goes")
        await keepers.until(lambda: len(b.orphans) == 2)
        assert b.orphans[0] == running.record
        assert b.orphans[1].session == session_id("ended")


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
            await journal(a, encode_record(known), session_id("other"))
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
