"""An inviter and joiners over real sockets and TLS on loopback."""

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest
from spake2 import SPAKE2_B

from in_process.invites import JOIN_CODE, LINK_PORT, make_inviter, make_joiner, open_invite
from meshd.agents.links.pairing import channel as channels
from meshd.agents.links.pairing import inviter as inviters
from meshd.agents.links.pairing import joiner as joiners
from meshd.agents.links.pairing.channel import PairingChannel
from meshd.agents.links.pairing.inviter import Inviter
from meshd.errors import InvalidRequest, PeerLost, PeerRefused, StorageError
from meshd.protocol.pairing.certificate import make_certificate
from meshd.protocol.pairing.code import InviteCode
from meshd.protocol.pairing.exchange import JoinerSide
from meshd.protocol.pairing.messages import Answer, Confirm, Invitation, Join, encode, encode_joiner
from meshd.values import parse_address


@pytest.fixture
def inviter(tmp_path: Path) -> Inviter:
    return make_inviter(tmp_path)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A joiner that was refused does not look for further inviters."""
    monkeypatch.setattr(joiners, "_SETTLE_S", 0.0)


async def connected(port: int) -> PairingChannel:
    return await channels.connect(("127.0.0.1", port), connect_s=5, handshake_s=5)


async def refused(port: int) -> bool:
    """Whether nothing listens on a port."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_a_device_with_the_code_gets_the_join_code_and_the_invite_is_over(inviter: Inviter, tmp_path: Path) -> None:
    stored: list[Invitation] = []
    async with open_invite(inviter) as opened:
        got, host = await make_joiner(opened.code, opened.port, store=stored.append).join()
        last = await opened.end()
    assert stored == [got]
    assert (got.join_code, got.name, got.link_port, host) == (JOIN_CODE, "desk", LINK_PORT, "127.0.0.1")
    assert (last.state, last.joined) == ("joined", "attic")
    assert await refused(opened.port)
    assert inviter.row() is None
    assert os.listdir(tmp_path) == []  # the certificate's key is not left behind


async def test_only_the_first_step_has_the_code(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        row = inviter.row()
        assert row is not None
        assert (row.code, row.number, row.state) == ("", opened.code.number, "waiting")


async def test_a_code_works_once(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        await make_joiner(opened.code, opened.port).join()
        await opened.end()
        with pytest.raises(PeerLost, match="no invite"):
            await make_joiner(opened.code, opened.port).join(0.5)
    async with open_invite(inviter) as again:
        with pytest.raises((PeerLost, PeerRefused)):
            await make_joiner(opened.code, again.port).join(5)


async def test_of_two_joiners_with_the_code_one_joins(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        both = (make_joiner(opened.code, opened.port, name=name).join(5) for name in ("attic", "cellar"))
        results = await asyncio.gather(*both, return_exceptions=True)
        assert (await opened.end()).state == "joined"
    assert sorted(isinstance(result, tuple) for result in results) == [False, True]


async def test_after_a_wrong_try_the_right_code_still_works(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        with pytest.raises(PeerRefused, match="code is wrong"):
            await make_joiner(opened.wrong(), opened.port).join()
        await make_joiner(opened.code, opened.port).join()
        last = await opened.end()
    assert (last.state, last.tries_left) == ("joined", inviters.TRIES - 2)


async def test_three_wrong_tries_close_the_invite(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        for _ in range(inviters.TRIES):
            with pytest.raises(PeerRefused):
                await make_joiner(opened.wrong(), opened.port).join()
        last = await opened.end()
        assert (last.state, last.tries_left) == ("tries", 0)
        assert await refused(opened.port)


async def test_many_connections_at_once_have_no_more_than_three_tries(inviter: Inviter) -> None:
    """The proofs that the inviter sends are what lets somebody test a guess. It sends three."""
    async with open_invite(inviter) as opened:
        answers = 0

        async def guess() -> None:
            nonlocal answers
            channel = await connected(opened.port)
            side = JoinerSide(opened.wrong(), channel.fingerprint, os.urandom)
            await channel.send(Join(share=side.share))
            with suppress(PeerLost):
                await channel.receive(Answer)
                answers += 1
            channel.abort()

        await asyncio.gather(*(guess() for _ in range(8)))
        last = await opened.end()
    assert (answers, last.state) == (inviters.TRIES, "tries")


async def test_a_joiner_does_not_spend_two_tries_of_one_listener(inviter: Inviter) -> None:
    """A listener may be found at several addresses, and several times."""
    async with open_invite(inviter) as opened:
        joiner = make_joiner(opened.wrong(), opened.port)
        for _ in range(5):
            joiner.found(joiners.Candidate((("127.0.0.1", opened.port), ("localhost", opened.port))))
        joiners._SETTLE_S = 1.0  # the fixture restores it
        with pytest.raises(PeerRefused):
            await joiner.join()
        row = inviter.row()
        assert row is not None
        assert row.tries_left == inviters.TRIES - 1


@asynccontextmanager
async def man_in_the_middle(port: int, folder: Path) -> AsyncIterator[int]:
    """A proxy that ends TLS with a certificate of its own, and passes all messages on. Yields: its port."""
    context = channels.listener_context(make_certificate(os.urandom), folder)
    outwards = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outwards.check_hostname, outwards.verify_mode = False, ssl.CERT_NONE

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection("127.0.0.1", port, ssl=outwards)
        await asyncio.gather(copy(reader, here), copy(there, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_man_in_the_middle_gains_nothing_although_the_code_is_right(inviter: Inviter, tmp_path: Path) -> None:
    stored: list[Invitation] = []
    async with open_invite(inviter) as opened, man_in_the_middle(opened.port, tmp_path) as port:
        with pytest.raises(PeerRefused, match="code is wrong"):
            await make_joiner(opened.code, port, store=stored.append).join()
        assert not stored
        await make_joiner(opened.code, opened.port, store=stored.append).join()
        assert (await opened.end()).state == "joined"


async def test_a_false_inviter_learns_nothing_that_depends_on_the_code(inviter: Inviter, tmp_path: Path) -> None:
    """The joiner sends its share only, and proves nothing before the inviter has."""
    seen: list[bytes] = []
    context = channels.listener_context(make_certificate(os.urandom), tmp_path)

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big")))
        writer.write(encode(Answer(share=SPAKE2_B(b"a guess").start(), proof=bytes(32))))
        seen.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0, ssl=context)
    async with open_invite(inviter) as opened:
        with pytest.raises(PeerRefused):
            await make_joiner(opened.code, server.sockets[0].getsockname()[1]).join()
    server.close()
    assert len(seen[0]) < 64
    assert seen[1:] in ([], [b""])


async def test_an_invite_expires(inviter: Inviter) -> None:
    async with open_invite(inviter, minutes=0.01) as opened:
        assert (await opened.end()).state == "expired"
        assert await refused(opened.port)


async def test_an_invite_expires_although_nobody_reads_its_steps(inviter: Inviter) -> None:
    async with aclosing(inviter.invite(0.01)) as steps:
        first = await anext(steps)
        await asyncio.sleep(0.7)
        row = inviter.row()
        assert row is not None
        assert row.state == "expired"
        with pytest.raises((PeerLost, PeerRefused)):
            await make_joiner(InviteCode.parse(first.code), parse_address(first.addresses[0], 0).port).join(2)


async def test_an_invite_is_closed_from_elsewhere_or_when_its_reader_leaves(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        assert inviter.close()
        assert (await opened.end()).state == "closed"
    assert not inviter.close()
    async with open_invite(inviter) as opened:
        assert not await refused(opened.port)
    assert await refused(opened.port)


async def test_one_invite_is_open_at_a_time(inviter: Inviter) -> None:
    async with open_invite(inviter):
        with pytest.raises(InvalidRequest, match="open already"):
            async with open_invite(inviter):
                pass
    async with open_invite(inviter):
        pass


async def test_an_invite_is_announced_as_long_as_it_is_open(tmp_path: Path) -> None:
    advertised: list[tuple[int, int]] = []
    async with open_invite(make_inviter(tmp_path, advertised)) as opened:
        for _ in range(100):
            if advertised:
                break
            await asyncio.sleep(0.01)
        assert advertised == [(opened.code.number, opened.port)]
    assert advertised == []


@pytest.mark.parametrize("when", ["before TLS", "after TLS", "within a message", "garbage", "too long"])
async def test_a_connection_that_breaks_before_its_first_message_costs_no_try(inviter: Inviter, when: str) -> None:
    async with open_invite(inviter) as opened:
        if when == "before TLS":
            socket.create_connection(("127.0.0.1", opened.port)).close()
        else:
            channel = await connected(opened.port)
            sent = {"after TLS": b"", "within a message": b"\0\x30abc", "garbage": b"\0\x03abc", "too long": b"\xff\xff"}[when]
            channel._writer.write(sent)
            await channel._writer.drain()
            if when in ("garbage", "too long"):
                await channel.ended()
            channel.abort()
        await make_joiner(opened.code, opened.port).join()
        assert (await opened.end()).tries_left == inviters.TRIES - 1


async def test_a_joiner_that_vanishes_after_the_inviters_proof_has_used_a_try(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        channel = await connected(opened.port)
        await channel.send(Join(share=JoinerSide(opened.code, channel.fingerprint, os.urandom).share))
        await channel.receive(Answer)
        channel.abort()
        await make_joiner(opened.code, opened.port).join()
        assert (await opened.end()).tries_left == inviters.TRIES - 2


async def test_a_joiner_that_vanishes_with_the_join_code_ends_the_invite(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        channel = await connected(opened.port)
        side = JoinerSide(opened.code, channel.fingerprint, os.urandom)
        await channel.send(Join(share=side.share))
        answer = await channel.receive(Answer)
        proof = side.finish(answer.share, answer.proof)
        await channel.send(Confirm(proof=proof, sealed=side.seal(encode_joiner("attic"))))
        channel.abort()
        last = await opened.end()
    assert (last.state, last.joined) == ("sent", "attic")


async def test_a_joiner_that_can_not_store_the_code_says_so_and_the_inviter_knows(inviter: Inviter) -> None:
    def full(_: Invitation) -> None:
        raise StorageError("the disk is full")

    async with open_invite(inviter) as opened:
        with pytest.raises(StorageError, match="full"):
            await make_joiner(opened.code, opened.port, store=full).join()
        assert (await opened.end()).state == "sent"


async def test_a_flood_of_silent_connections_keeps_no_joiner_out(inviter: Inviter) -> None:
    async with open_invite(inviter) as opened:
        silent = await asyncio.to_thread(lambda: [socket.create_connection(("127.0.0.1", opened.port)) for _ in range(200)])
        try:
            await make_joiner(opened.code, opened.port).join()
            assert (await opened.end()).state == "joined"
        finally:
            for each in silent:
                each.close()


async def test_a_connection_that_says_nothing_is_closed(inviter: Inviter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inviters, "HANDSHAKE_S", 0.2)
    async with open_invite(inviter) as opened:
        channel = await connected(opened.port)
        async with asyncio.timeout(10):
            await channel.ended()
        row = inviter.row()
        assert row is not None
        assert row.tries_left == inviters.TRIES
