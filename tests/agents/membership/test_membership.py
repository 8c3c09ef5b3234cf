"""Membership over real links: sightings, adverts, gossip and notices."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from in_process.peer_events import CAPABILITY
from in_process.peers import KEY, QUICK, until
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.membership import Membership, SelfDescription
from meshd.agents.membership.peer_events import PeerState
from meshd.agents.membership.sources import DuplicateIdentity, PeerFound, SourceNotice
from meshd.agents.observe.events import EventBus
from meshd.clock import SystemClock
from meshd.protocol.identity import load_identity
from meshd.protocol.messages import Advertise
from meshd.state import StateFolder
from meshd.types import Advert, LearnedRates, PeerId

STRANGER = PeerId("c" * 52)


class Member:
    """A peer with links and membership, which records what the membership reports."""

    def __init__(self, folder: Path, name: str) -> None:
        self.sessions = 0
        self.adverts: list[Advert] = []
        self.gone: list[PeerId] = []
        clock = SystemClock()
        self.links = Links(
            load_identity(StateFolder.open(folder / name), KEY, os.urandom),
            name,
            1,
            LinkSettings(host="127.0.0.1", port=0, timing=QUICK),
            clock,
            on_up=lambda *link: self.membership.on_up(*link),
            on_down=lambda *link: self.membership.on_down(*link),
            on_notice=lambda text: self.membership.notice(text),
        )
        self.membership = Membership(
            description=SelfDescription(
                peer=self.links.id,
                name=name,
                incarnation=1,
                version="0.1.0",
                capability=lambda: CAPABILITY,
                holdings=tuple,
                models=tuple,
                learned=LearnedRates,
                sessions=lambda: self.sessions,
                draining=bool,
            ),
            links=self.links,
            prober=LinkProber(self.links, clock, lambda: None),
            clock=clock,
            bus=EventBus(clock),
            on_advert=self.adverts.append,
            on_gone=lambda peer, reason: self.gone.append(peer),
        )
        self.membership.register()
        self.port = self.links.bind()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Member"]:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.links.run())
            membership = group.create_task(self.membership.run([]))
            yield self
            membership.cancel()
            await self.links.close("the test is over")

    def hears_of(self, other: "Member") -> None:
        self.membership.on_sighting(
            PeerFound(source="mdns", peer=other.links.id, addresses=("127.0.0.1",), port=other.port, name="a hint")
        )

    def state_of(self, other: "Member") -> PeerState:
        known = self.membership.table.get(other.links.id)
        return known.state if known is not None else PeerState.UNKNOWN


@pytest.fixture
async def members(tmp_path: Path) -> AsyncIterator[list[Member]]:
    """Three running members that do not know one another."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Member(tmp_path, name).running()) for name in ("ann", "bob", "cat")]


async def test_a_sighting_becomes_a_link_and_both_exchange_adverts(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    assert (ann.state_of(bob), bob.state_of(ann)) == (PeerState.FOUND, PeerState.UNKNOWN)
    await until(lambda: bool(ann.adverts and bob.adverts))
    assert (ann.state_of(bob), bob.state_of(ann)) == (PeerState.ALIVE, PeerState.ALIVE)
    assert [advert.name for advert in ann.membership.adverts()] == ["ann", "bob"]
    assert ann.membership.name_of(bob.links.id) == "bob"
    assert ann.membership.name_of(STRANGER) == "cccccccc"


async def test_a_change_is_sent_to_all_at_once(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: bool(bob.adverts))
    ann.sessions = 3
    ann.membership.changed()
    await until(lambda: bob.adverts[-1].sessions == 3)
    assert bob.adverts[-1].revision > bob.adverts[0].revision


async def test_a_peer_learns_of_others_from_adverts_and_dials_them(members: list[Member]) -> None:
    ann, bob, cat = members
    bob.hears_of(cat)
    await until(lambda: bob.state_of(cat) is PeerState.ALIVE)
    ann.hears_of(bob)
    bob.membership.changed()
    await until(lambda: ann.state_of(cat) is PeerState.ALIVE)


async def test_a_peer_that_closes_its_links_has_left_and_is_reported_as_gone(members: list[Member]) -> None:
    ann, bob, _ = members
    ann.hears_of(bob)
    await until(lambda: ann.state_of(bob) is PeerState.ALIVE)
    await bob.links.close("this peer stops")
    await until(lambda: ann.state_of(bob) is PeerState.LEFT)
    assert ann.gone == [bob.links.id]
    (row,) = ann.membership.rows()
    assert (row["state"], row["why"]) == ("left", "it left: this peer stops")


async def test_an_advert_in_the_name_of_another_peer_is_dropped(members: list[Member]) -> None:
    ann, bob, cat = members
    ann.hears_of(bob)
    await until(lambda: bool(ann.adverts))
    known = len(ann.adverts)
    bob.links.send(ann.links.id, Advertise(advert=cat.membership.own_advert()))
    bob.sessions = 1
    bob.links.send(ann.links.id, Advertise(advert=bob.membership.own_advert()))
    await until(lambda: ann.adverts[-1].sessions == 1)
    assert {advert.peer for advert in ann.adverts[known:]} == {bob.links.id}
    assert ann.state_of(cat) is PeerState.UNKNOWN


@pytest.mark.parametrize("address", ["", "no port", "127.0.0.1:0", "127.0.0.1:99999", ":"])
async def test_a_neighbour_with_a_bad_address_is_ignored(members: list[Member], address: str) -> None:
    ann = members[0]
    ann.membership._hear_of(STRANGER, address)
    ann.membership._hear_of(PeerId("not an id"), "127.0.0.1:6375")
    ann.membership._hear_of(ann.links.id, "127.0.0.1:6375")
    assert len(ann.membership.table) == 0


async def test_a_repeated_notice_is_kept_once_and_notices_are_bounded(members: list[Member]) -> None:
    membership = members[0].membership
    membership.on_sighting(SourceNotice(source="mdns", message="no network", hint="connect one"))
    membership.on_sighting(DuplicateIdentity(source="mdns", peer=STRANGER, addresses=("10.0.0.7",), port=1))
    membership.on_sighting(SourceNotice(source="mdns", message="no network", hint="connect one"))
    assert list(membership.notices.values()) == ["remove identity.key from the copy and start it again", "connect one"]
    for number in range(30):
        membership.notice(f"notice {number}")
    assert list(membership.notices) == [f"notice {number}" for number in range(10, 30)]
