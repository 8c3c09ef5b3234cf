"""Opening links: dialled and accepted connections that become links or are refused with a reason."""

import asyncio
import time

import pytest

from in_process.peers import QUICK, WAIT_S, Peers, until
from meshd.agents.links import open as open_module
from meshd.errors import PeerLost, PeerRefused
from meshd.protocol.identity import ClusterKey


async def test_this_peers_own_address_makes_no_link_and_a_copied_identity_is_reported(peers: Peers) -> None:
    a = peers.start("a")
    a.dial(a)
    await until(lambda: bool(a.outcomes))
    assert (a.outcomes[0].peer, a.outcomes[0].reason) == (a.id, "")
    copy = peers.start("a2", folder="a", incarnation=2)
    copy.dial(a)
    await until(lambda: bool(a.outcomes[1:]) and bool(copy.outcomes))
    assert "state folder was copied" in a.outcomes[1].reason
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
    assert [(outcome.refused, outcome.peer) for outcome in a.outcomes] == [(True, None), (False, None)]
    assert "Connection refused" in a.outcomes[1].reason


async def test_a_flood_of_silent_connections_does_not_keep_a_peer_out(peers: Peers) -> None:
    a = peers.start("a")
    streams = [await asyncio.open_connection("127.0.0.1", a.port) for _ in range(200)]
    try:
        half_open = a.links._opener._half_open
        await until(lambda: len(half_open) == half_open.most_per_host)
        b = peers.start("b")
        b.dial(a)
        assert await a.next_up() == b.id
        await until(lambda: len(half_open) <= half_open.most_per_host)
    finally:
        for _, writer in streams:
            writer.transport.abort()


async def test_one_host_can_not_take_all_links(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_module, "MAX_LINKS_PER_HOST", 2)
    a = peers.start("a", host="0.0.0.0")
    many = [peers.start(f"false{number}") for number in range(4)]
    for each in many:
        each.dial(a)
    crowded = lambda each: any("no room for more links with 127.0.0.1" in outcome.reason for outcome in each.outcomes)  # noqa: E731
    await until(lambda: len(a.links.peers()) == 2 and sum(map(crowded, many)) == 2)


async def test_the_addresses_of_a_peer_are_forgotten_with_its_link(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await a.next_up()
    assert a.links.addresses(b.id) == [f"127.0.0.1:{b.port}"]
    await b.stop()
    await a.next_down()
    assert a.links.addresses(b.id) == []
