"""Rotations among peers with real sockets: who gets the new key, and who is kept out."""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from in_process.peers import QUICK, until
from in_process.trusting import CLOCK, Club, linked
from meshd.agents.trust.files import StateFiles
from meshd.agents.trust.trust import EXCLUDED
from meshd.errors import ConfigError, InvalidRequest, PeerLost
from meshd.protocol import transport
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.codec import encode
from meshd.protocol.framing import PREFIX, FrameLimits, frame_head
from meshd.protocol.identity import RETURN_SERVER, load_identity
from meshd.protocol.messages import PROTOCOL_VERSION, Heartbeat, Hello, Lane, Message, Rotation
from meshd.protocol.owner import OwnerKey, load_owner_key
from meshd.protocol.trust import MAX_GENERATION, RotationChain, Standing
from meshd.state import StateFolder
from meshd.types import PeerId


@pytest.fixture
async def club(tmp_path: Path) -> AsyncIterator[Club]:
    club = Club(tmp_path)
    yield club
    await club.stop()


async def test_a_rotation_reaches_all_that_stay_and_no_link_breaks(club: Club) -> None:
    a, b, c = (club.start(name) for name in "abc")
    await club.together(a, b, c)
    await club.rotate(a, b, c)
    await until(lambda: all(member.generation == 1 for member in (a, b, c)))
    await until(lambda: all(len(member.exchange.holders) == 2 for member in (a, b, c)))
    assert all(linked(one, other) for one in (a, b, c) for other in (a, b, c) if one is not other)
    assert not a.downs
    assert not b.downs
    assert not c.downs


async def test_a_peer_whose_link_has_ended_is_no_holder(club: Club) -> None:
    a, b, c = (club.start(name) for name in "abc")
    await club.together(a, b, c)
    await c.links.close("it leaves")
    await until(lambda: not linked(a, c))
    assert a.exchange.holders == {b.id}


async def test_a_peer_that_is_not_linked_with_the_owner_gets_it_from_another(club: Club) -> None:
    a, b, c = (club.start(name) for name in "abc")
    b.dial(a, c)
    await until(lambda: linked(b, a) and linked(b, c))
    await club.rotate(a, b, c)
    await until(lambda: c.generation == 1)


async def test_an_excluded_peer_is_cut_and_told_and_can_not_link_again(club: Club) -> None:
    a, b, x = (club.start(name) for name in "abx")
    await club.together(a, b, x)
    x.dial(a, b)
    await club.rotate(a, b)
    await until(lambda: not a.links.peers().count(x.id) and not linked(b, x) and b.generation == 1)
    await until(lambda: x.trust.exclusion is not None)
    assert any("this device was excluded" in notice for notice in x.notices)
    assert [(event.generation, event.staying, event.excluded) for event in x.events] == [(1, 2, True)]
    assert [(event.generation, event.staying, event.excluded) for event in b.events] == [(1, 2, False)]
    assert x.generation == 0
    again = club.start("x-again", club.first_key)
    for one in (a, b):
        one.dial(x, again)
    again.dial(a, b)
    await until(lambda: EXCLUDED in a.reasons() and EXCLUDED in b.reasons())
    await asyncio.sleep(0.5)
    assert not linked(a, again)
    assert not linked(b, again)
    assert not linked(a, x)
    assert not linked(b, x)
    assert again.generation == x.generation == 0
    assert linked(a, b)


async def test_identities_minted_before_are_kept_out_also_one_that_was_linked(club: Club) -> None:
    a, b, x = (club.start(name) for name in "abx")
    minted = [club.start(f"minted{number}") for number in range(3)]
    await club.together(a, b, x, minted[0])
    await club.rotate(a, b)
    await until(lambda: b.generation == 1)
    for identity in (x, *minted):
        identity.dial(a, b)
        a.dial(identity)
        b.dial(identity)
    await until(lambda: all(identity.trust.exclusion is not None for identity in (x, *minted)))
    await asyncio.sleep(0.5)
    assert a.links.peers() == [b.id]
    assert b.links.peers() == [a.id]
    assert all(identity.generation == 0 for identity in (x, *minted))


async def test_a_peer_that_was_off_during_two_rotations_returns(club: Club) -> None:
    a, b, c = (club.start(name) for name in "abc")
    await club.together(a, b, c)
    await c.stop()
    club.members.remove(c)
    for generation in (1, 2):
        record, key = club.record(a, [a.id, b.id, c.id])
        await a.trust.order(a.trust.chain.extended(record).encode(), key.secret)
        await until(lambda generation=generation: b.generation == generation)
    back = club.start("c")
    assert back.generation == 0
    back.dial(a)
    await until(lambda: back.generation == 2 and linked(back, a))
    back.dial(b)
    await until(lambda: linked(back, b))


async def test_a_peer_that_was_off_also_returns_if_only_the_others_can_dial(club: Club) -> None:
    a, c = club.start("a"), club.start("c")
    await club.together(a, c)
    await c.stop()
    club.members.remove(c)
    await club.rotate(a, c)
    back = club.start("c", port=c.port)
    await until(lambda: back.generation == 1 and linked(back, a))


async def test_a_disk_that_is_slower_than_a_handshake_keeps_nobody_from_returning_or_from_being_told(
    club: Club, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, x = (club.start(name) for name in "abx")
    minted = club.start("minted")
    await club.together(a, b, x)
    await b.stop()
    club.members.remove(b)
    await club.rotate(a, b)
    for name in ("store", "store_exclusion"):
        monkeypatch.setattr(StateFiles, name, slowly(getattr(StateFiles, name)))
    back = club.start("b")
    for member in (back, minted):
        member.dial(a)
    await until(lambda: back.generation == 1 and linked(back, a) and minted.trust.exclusion is not None)


def slowly(write: Callable[..., Any]) -> Callable[..., Any]:
    def write_slowly(*arguments: Any) -> Any:
        time.sleep(2 * QUICK.handshake_s)
        return write(*arguments)

    return write_slowly


async def test_a_returning_peer_finds_it_again_after_a_restart(club: Club) -> None:
    a, b = club.start("a"), club.start("b")
    await club.together(a, b)
    await club.rotate(a, b)
    await until(lambda: b.generation == 1)
    await b.stop()
    club.members.remove(b)
    back = club.start("b")
    assert back.generation == 1
    assert back.trust.chain.hash == a.trust.chain.hash
    back.dial(a)
    await until(lambda: linked(back, a))


async def test_a_device_with_the_new_code_joins_and_with_the_old_one_is_told(club: Club) -> None:
    a, b = club.start("a"), club.start("b")
    await club.together(a, b)
    await club.rotate(a, b)
    new = club.start("new", a.trust.key)
    assert new.trust.unconfirmed
    new.dial(a)
    await until(lambda: linked(new, a) and not new.trust.unconfirmed)
    assert new.trust.chain.hash == a.trust.chain.hash
    await until(lambda: linked(a, new) and a.trust.belongs(new.id))
    await club.rotate(a, b, new)
    await until(lambda: new.generation == b.generation == 2)
    late = club.start("late", ClusterKey.generate(os.urandom, club.first_key.owner, 1))  # as an outdated code has one
    late.dial(a)
    await until(lambda: late.trust.outdated)
    assert any("earlier key" in notice for notice in late.notices)
    assert late.generation == 1
    assert late.trust.exclusion is None


async def test_a_newcomer_that_a_past_owner_misled_dials_as_usual_once_a_member_has_confirmed_its_key(club: Club) -> None:
    a, b = club.start("a"), club.start("b")
    await club.together(a, b)
    await club.rotate(a, b)
    new = club.start("new", a.trust.key)
    record, _ = club.record(a, [a.id])
    await new.trust.hear(b.id, RotationChain(club.first_key.owner, (record,)).encode(), b"", linked=False)
    assert new.trust.outdated
    assert new.links._dialler.rarely
    a.dial(new)
    await until(lambda: linked(new, a) and not new.trust.unconfirmed)
    assert not new.trust.outdated
    assert not new.links._dialler.rarely


async def test_a_member_without_the_owner_key_can_not_rotate(club: Club) -> None:
    a, b, x = (club.start(name) for name in "abx")
    await club.together(a, b, x)
    record, key = club.record(x, [x.id, b.id], owner=OwnerKey.from_seed(os.urandom(32)))
    forged = RotationChain(club.first_key.owner, (record,)).encode()
    with pytest.raises(InvalidRequest, match="not signed by the cluster's owner"):
        await x.trust.order(forged, key.secret)
    x.links.send(b.id, Rotation(secret=True), key.secret + forged)
    x.links.send(a.id, Rotation(secret=True), key.secret + forged)
    await club.rotate(a, b)
    await until(lambda: b.generation == 1 and not linked(b, x))
    assert b.trust.chain.hash == a.trust.chain.hash


async def test_a_wrong_key_with_a_genuine_record_is_refused(club: Club) -> None:
    a, b, x = (club.start(name) for name in "abx")
    await club.together(b, x)
    record, _ = club.record(a, [a.id, b.id])
    genuine = RotationChain(club.first_key.owner, (record,)).encode()
    x.links.send(b.id, Rotation(secret=True), os.urandom(32) + genuine)
    await asyncio.sleep(0.3)
    assert b.generation == 0


async def test_two_owners_that_rotate_at_the_same_moment_converge(club: Club) -> None:
    a, b, c, d = (club.start(name) for name in "abcd")
    await club.together(a, b, c, d)
    everyone = [member.id for member in (a, b, c, d)]
    for at in (a, d):
        record, key = club.record(at, everyone)
        asyncio.get_running_loop().create_task(at.trust.order(at.trust.chain.extended(record).encode(), key.secret))
    await until(lambda: all(member.generation == 1 for member in (a, b, c, d)))
    await until(lambda: len({member.trust.chain.hash for member in (a, b, c, d)}) == 1)
    assert len({member.trust.key for member in (a, b, c, d)}) == 1
    assert not any(member.downs for member in (a, b, c, d))


async def test_an_exclusion_that_lost_against_a_rotation_of_another_owner_is_undone(club: Club) -> None:
    a, b, x = (club.start(name) for name in "abx")
    await club.together(a, b, x)
    loser, losing = club.record(a, [a.id, b.id])
    winner, winning = club.record(a, [a.id, b.id, x.id])
    while winner.hash > loser.hash:
        winner, winning = club.record(a, [a.id, b.id, x.id])
    first = club.first_key.owner
    await a.trust.order(RotationChain(first, (loser,)).encode(), losing.secret)
    await until(lambda: x.trust.exclusion is not None and b.generation == 1)
    await b.trust.order(RotationChain(first, (winner,)).encode(), winning.secret)
    await until(lambda: a.trust.chain.hash == winner.hash and x.trust.chain.hash == winner.hash and x.trust.exclusion is None)
    await until(lambda: linked(a, x))


async def test_the_owner_key_is_copied_only_if_it_is_the_clusters(club: Club) -> None:
    a, b = club.start("a"), club.start("b")
    await club.together(a, b)
    with pytest.raises(InvalidRequest, match="not the owner key"):
        await a.exchange.give_owner_key(b.id, os.urandom(32))
    await a.exchange.give_owner_key(b.id, club.owner.seed)
    stored = load_owner_key(b.folder, club.first_key.owner, club.owner.hash)
    assert stored is not None
    assert stored.seed == club.owner.seed
    path = next(b.folder.path.glob("owner-*.key"))
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_thief_with_the_owner_key_is_powerless_once_it_was_changed(club: Club) -> None:
    a, b, thief = (club.start(name) for name in ("a", "b", "thief"))
    await club.together(a, b, thief)
    stolen = club.owner
    await club.rotate(a, b, new_owner=OwnerKey.from_seed(os.urandom(32)))
    await until(lambda: b.generation == 1)
    record, key = club.record(a, [a.id, b.id, thief.id], owner=stolen)
    own = RotationChain(club.first_key.owner, (record,))
    await thief.trust.order(own.encode(), key.secret)
    assert thief.generation == 2
    thief.dial(a, b)
    a.dial(thief)
    b.dial(thief)
    await asyncio.sleep(1.0)
    assert a.generation == b.generation == 1
    assert not linked(a, thief)
    assert not linked(b, thief)
    assert linked(a, b)


async def test_a_thief_can_not_leave_the_owner_without_a_number_for_the_next_rotation(club: Club) -> None:
    """The thief's rotation has the highest number and excludes nobody, so that all devices take it."""
    a, b, thief = (club.start(name) for name in ("a", "b", "thief"))
    await club.together(a, b, thief)
    everyone, stolen = [a.id, b.id, thief.id], club.owner
    record, key = club.record(thief, everyone, generation=MAX_GENERATION)
    await thief.trust.order(thief.trust.chain.extended(record).encode(), key.secret)
    await until(lambda: a.generation == b.generation == MAX_GENERATION)
    with pytest.raises(ConfigError, match="highest number"):
        a.trust.chain.next_generation(a.generation, new_owner=False)
    following = a.trust.chain.next_generation(a.generation, new_owner=True)
    await club.rotate(a, b, new_owner=OwnerKey.from_seed(os.urandom(32)), generation=following)
    await until(lambda: b.trust.chain.hash == a.trust.chain.hash and not linked(a, thief) and not linked(b, thief))
    assert thief.generation == MAX_GENERATION
    again, _ = club.record(a, everyone, owner=stolen)
    assert a.trust.chain.standing_of(RotationChain(club.first_key.owner, (again,))) is Standing.OLDER
    await club.rotate(a, b)
    await until(lambda: b.generation == a.generation == following + 1)


async def test_an_old_certificate_opens_nothing(club: Club) -> None:
    """The excluded peer uses its certificate of the old authority on both kinds of connection."""
    a, x = club.start("a"), club.start("x")
    await club.together(a, x)
    await club.rotate(a)
    for certificate, name in (("identity.crt", ""), ("identity.crt", "return.meshd"), ("return.crt", "")):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(x.folder.path / certificate, x.folder.path / "identity.key")
        reader, writer = await asyncio.open_connection("127.0.0.1", a.port, ssl=context, server_hostname=name)
        assert await reader.read() == b""
        writer.close()
    assert a.links.peers() == []


@pytest.mark.parametrize("hostile", ["hello", "garbage", "too large", "three messages", "silence"])
async def test_a_past_member_can_not_do_more_than_ask_on_its_connection(club: Club, hostile: str) -> None:
    a, b, x = (club.start(name) for name in "abx")
    await club.together(a, b, x)
    await club.rotate(a, b)
    context = load_identity(x.folder, club.first_key, os.urandom).return_client
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port, ssl=context, server_hostname=RETURN_SERVER)
    frames = {
        "hello": framed(Heartbeat(sequence=1, sent_ns=1)),
        "garbage": os.urandom(200),
        "too large": PREFIX.pack(10, 16 << 20),
        "three messages": 3 * framed(Rotation()),
        "silence": b"",
    }
    writer.write(frames[hostile])
    async with asyncio.timeout(5.0):
        answer = await reader.read()
    writer.close()
    assert a.trust.key.secret not in answer
    assert linked(a, b)
    assert not linked(a, x)


@pytest.mark.parametrize("identity", ["excluded", "minted"])
async def test_the_key_itself_is_not_sent_to_who_is_not_on_the_list(club: Club, identity: str) -> None:
    """An honest peer would not use the key. This one looks at what it is sent, also on the link that is ended."""
    a, b, x = (club.start(name) for name in "abx")
    await club.together(a, b, x)
    told: list[bytes] = []

    async def listen(peer: PeerId, chain: bytes, secret: bytes, *, linked: bool) -> None:
        told.append(secret)

    x.trust.hear = listen  # type: ignore[method-assign, assignment]
    await club.rotate(a, b)
    await until(lambda: not linked(a, x) and not linked(b, x))
    assert set(told) <= {b""}
    folder = x.folder if identity == "excluded" else StateFolder.open(club.root / "minted")
    context = load_identity(folder, club.first_key, os.urandom).return_client
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port, ssl=context, server_hostname=RETURN_SERVER)
    writer.write(framed(Rotation()))
    async with asyncio.timeout(5.0):
        answer = await reader.read()
    writer.close()
    assert a.trust.chain.encode() in answer
    assert a.trust.key.secret not in answer


def framed(message: Message) -> bytes:
    return frame_head(encode(message), 0)


async def test_a_connection_that_is_being_opened_when_the_key_changes_becomes_no_link(club: Club) -> None:
    a, b, x = (club.start(name) for name in "abx")
    await club.together(a, b)
    identity = load_identity(x.folder, club.first_key, os.urandom)
    limits = FrameLimits()
    connection = await transport.dial(
        ("127.0.0.1", a.port), identity.client, limits=limits, now=CLOCK.monotonic, connect_s=1.0, handshake_s=1.0
    )
    await club.rotate(a, b)
    hello = Hello(
        version=PROTOCOL_VERSION,
        features=(),
        software="meshd/test",
        peer=x.id,
        name="x",
        incarnation=7,
        link=7,
        lane=Lane.CONTROL,
        max_header=limits.max_header,
        max_payload=limits.max_payload,
        port=1,
    )
    connection.send(hello)
    with pytest.raises(PeerLost):
        await connection.first()
    await asyncio.sleep(0.2)
    assert a.links.peers() == [b.id]
    assert a.links._table.get(x.id) is None
