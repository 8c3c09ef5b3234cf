"""Checks of reachability between real peers: only the asking peer's own addresses are dialled, and only so often."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from in_process.peers import Peer, Peers, until
from meshd.agents.admin import reach
from meshd.agents.admin.reach import ReachChecker
from meshd.agents.budget import TokenBucket
from meshd.agents.membership.membership import Membership
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.membership.sources import PeerFound
from meshd.clock import SystemClock
from meshd.errors import RemoteFailure
from meshd.protocol.messages import CheckReach, ReachChecked


class Site:
    """A peer with a checker, and the addresses that it has dialled for others."""

    def __init__(self, peer: Peer) -> None:
        self.peer, self.table = peer, PeerTable()
        membership = SimpleNamespace(table=self.table, name_of=lambda other: f"name of {other:.4}")
        self.checker = ReachChecker(peer.links, cast("Membership", membership), SystemClock())
        self.checker.register()
        self.dialled: list[tuple[str, int]] = []
        usual = peer.links.reach

        async def noted(host: str, port: int) -> Any:
            self.dialled.append((host, port))
            return await usual(host, port)

        peer.links.reach = noted  # type: ignore[method-assign]

    def knows(self, other: "Site", host: str, port: int, source: str) -> None:
        self.table.apply(PeerFound(source=source, peer=other.peer.id, addresses=(host,), port=port), 1.0)

    async def ask(self, other: "Site", nonce: str = "ab" * 16) -> ReachChecked:
        reply, _ = await self.peer.links.request(
            other.peer.id, lambda number: CheckReach(request=number, nonce=nonce), timeout_s=10
        )
        assert isinstance(reply, ReachChecked)
        return reply


@pytest.fixture
async def pair(peers: Peers) -> tuple[Site, Site]:
    a, b = Site(peers.start("a")), Site(peers.start("b"))
    a.peer.dial(b.peer)
    await a.peer.next_up()
    await b.peer.next_up()
    return a, b


async def test_both_sides_reach_one_another_and_the_clocks_agree(pair: tuple[Site, Site]) -> None:
    a, b = pair
    reached = await a.checker.check(b.peer.id)
    assert reached.name == f"name of {b.peer.id:.4}"
    assert [(attempt.address, attempt.why) for attempt in reached.there] == [(f"127.0.0.1:{b.peer.port}", "")]
    assert reached.back is not None
    assert [(attempt.address, attempt.why) for attempt in reached.back] == [(f"127.0.0.1:{a.peer.port}", "")]
    assert reached.ahead_s == pytest.approx(0, abs=1)
    assert (reached.heard_here, reached.heard_there) == (None, None)


async def test_the_link_and_its_log_stay_as_they_are(pair: tuple[Site, Site]) -> None:
    a, b = pair
    await a.checker.check(b.peer.id)
    await asyncio.sleep(0.1)
    assert (a.peer.links.peers(), b.peer.links.peers()) == ([b.peer.id], [a.peer.id])
    assert a.peer.links.refusals() + b.peer.links.refusals() == []
    assert all(not outcome.refused for outcome in [*a.peer.outcomes, *b.peer.outcomes])


async def test_a_port_that_is_closed_is_told_with_the_reason(pair: tuple[Site, Site], unused_tcp_port: int) -> None:
    a, b = pair
    b.knows(a, "127.0.0.1", unused_tcp_port, "mdns")
    reply = await a.ask(b)
    why = {attempt.address: attempt.why for attempt in reply.attempts}
    assert why[f"127.0.0.1:{a.peer.port}"] == ""
    assert "Connection refused" in why[f"127.0.0.1:{unused_tcp_port}"]


async def test_only_addresses_that_the_asking_peer_gives_of_itself_are_dialled(pair: tuple[Site, Site], peers: Peers) -> None:
    """Gossip is another peer's word. An address at which another peer answers is told as such."""
    a, b = pair
    other = peers.start("c")
    b.knows(a, "127.0.0.1", 1, "gossip")
    b.knows(a, "127.0.0.1", other.port, "mdns")
    reply = await a.ask(b)
    assert set(b.dialled) == {("127.0.0.1", a.peer.port), ("127.0.0.1", other.port)}
    why = {attempt.address: attempt.why for attempt in reply.attempts}
    assert why[f"127.0.0.1:{other.port}"] == "another peer answers there"


async def test_a_peer_is_not_made_to_dial_without_end(pair: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    for number in range(reach._CHECKS_AT_ONCE):
        await a.ask(b, f"{number:032x}")
    with pytest.raises(RemoteFailure, match="run here already"):
        await a.ask(b)
    assert len(b.dialled) == reach._CHECKS_AT_ONCE
    reached = await a.checker.check(b.peer.id)
    assert reached.back is None
    assert "run here already" in reached.error


async def test_a_member_can_not_have_a_network_scanned(pair: tuple[Site, Site], unused_tcp_port_factory: Callable[[], int]) -> None:
    """By MQTT a member can publish any address as its own. Addresses at which it answers cost nothing of the budget."""
    a, b = pair
    b.checker._failed = TokenBucket(0.0, reach._FAILED_AT_ONCE)
    b.checker._budget = TokenBucket(1000.0, 1000)
    for number in range(2 * reach._FAILED_AT_ONCE):
        b.table = b.checker.membership.table = PeerTable()
        b.knows(a, "localhost", a.peer.port, "mdns")
        b.knows(a, "127.0.0.1", unused_tcp_port_factory(), "mqtt")
        reply = await a.ask(b, f"{number:032x}")
    assert {attempt.why for attempt in reply.attempts} == {""}
    failed = [port for _, port in b.dialled if port != a.peer.port]
    assert len(failed) == reach._FAILED_AT_ONCE


async def test_two_checks_of_one_peer_do_not_run_at_once(pair: tuple[Site, Site]) -> None:
    a, b = pair
    answers = await asyncio.gather(a.ask(b), a.ask(b), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ReachChecked, RemoteFailure]


async def test_a_peer_without_this_message_is_told_as_such(peers: Peers, tmp_path: Path) -> None:
    a, b = Site(peers.start("a")), peers.start("b")
    a.peer.dial(b)
    await a.peer.next_up()
    await until(lambda: bool(a.peer.links.peers()))
    reached = await a.checker.check(b.id)
    assert reached.back is None
    assert "message 110 is not handled here" in reached.error
