"""Opening links: dialled and accepted connections that become links or are refused with a reason."""

import asyncio
import time

import pytest

from in_process.peers import QUICK, WAIT_S, Peers, until
from meshd.errors import PeerLost, PeerRefused
from meshd.protocol.identity import ClusterKey


async def test_this_peers_own_address_makes_no_link_and_a_copied_identity_is_reported(peers: Peers) -> None:
    a = peers.start("a")
    a.dial(a)
    await until(lambda: bool(a.links.addresses(a.id)))
    assert a.notices == []
    copy = peers.start("a2", folder="a", incarnation=2)
    copy.dial(a)
    await until(lambda: bool(a.notices) and bool(copy.notices))
    assert "state folder was copied" in a.notices[0]
    assert a.story == copy.story == []


async def test_silent_connections_are_closed(peers: Peers) -> None:
    a = peers.start("a", timing=QUICK)
    streams = [await asyncio.open_connection("127.0.0.1", a.port) for _ in range(20)]
    began = time.monotonic()
    for reader, writer in streams:
        async with asyncio.timeout(WAIT_S):
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
    assert time.monotonic() - began < 4 * QUICK.handshake_s
    b = peers.start("b")
    b.dial(a)
    await a.next_up()


async def test_a_connection_without_tls_is_refused(peers: Peers) -> None:
    a = peers.start("a")
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(WAIT_S):
        await reader.read()
        writer.close()
        await writer.wait_closed()
    await until(lambda: bool(a.links.refusals()))
    assert "does not speak TLS" in a.links.refusals()[0]["reason"]


async def test_a_dial_returns_the_peers_id_even_if_it_is_linked_or_is_this_peer(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    opener = a.links._opener
    for _ in range(2):
        assert await opener.dial(("127.0.0.1", b.port)) == b.id
    assert await opener.dial(("127.0.0.1", a.port)) == a.id
    assert a.story == ["up b"]


async def test_a_failed_dial_raises_peer_refused_or_peer_lost(peers: Peers, unused_tcp_port: int) -> None:
    a, stranger = peers.start("a"), peers.start("s", key=ClusterKey(b"x" * 32))
    opener = a.links._opener
    with pytest.raises(PeerRefused, match="not of this cluster"):
        await opener.dial(("127.0.0.1", stranger.port))
    with pytest.raises(PeerLost):
        await opener.dial(("127.0.0.1", unused_tcp_port))
    assert len(a.links.refusals()) == 1
