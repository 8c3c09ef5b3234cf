"""Who asks whom to keep models placed, when, and what comes of a refusal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from in_process.adverts import CARD, advert, held
from in_process.clocks import SetClock
from in_process.peers import Peer, Peers, until
from meshd.agents.placement.keeper import Keeper
from meshd.errors import OutOfMemory
from meshd.protocol.messages import Place, Placed, Unplace, Unplaced
from meshd.types import Advert, Holding, PeerId


@dataclass
class Asked:
    """A peer that does, or refuses, what it is asked for."""

    peer: Peer
    places: list[Place] = field(default_factory=list)
    unplaced: int = 0
    full: bool = False

    def __post_init__(self) -> None:
        self.peer.links.register(Place, self._on_place)
        self.peer.links.register(Unplace, self._on_unplace)

    def _on_place(self, sender: PeerId, message: Place, payload: memoryview) -> Placed:
        self.places.append(message)
        if self.full:
            raise OutOfMemory("no room")
        return Placed(request=message.request, layers=message.layers, kv_tokens=message.kv_tokens)

    def _on_unplace(self, sender: PeerId, message: Unplace, payload: memoryview) -> Unplaced:
        self.unplaced += 1
        return Unplaced(request=message.request, freed_bytes=1)


@dataclass
class Pair:
    """Two linked peers, the first with a keeper, and what they advertise."""

    first: Asked
    second: Asked
    keeper: Keeper
    clock: SetClock
    adverts: list[Advert]

    async def look(self, *adverts: Advert) -> None:
        self.adverts[:] = adverts
        await self.keeper._look()

    async def settled(self) -> None:
        await until(lambda: not self.keeper._asked)


async def pair(peers: Peers, *, leads: bool) -> Pair:
    """The keeper's peer has the smaller id, or the larger one."""
    one, other = peers.start("a"), peers.start("b")
    if (one.id < other.id) != leads:
        one, other = other, one
    one.dial(other)
    await one.next_up()
    adverts: list[Advert] = []
    clock = SetClock()
    keeper = Keeper(
        me=one.id,
        links=one.links,
        adverts=lambda: adverts,
        suspects=list,
        cards=lambda: {CARD.id: CARD},
        names=lambda peer: peer[:8],
        clock=clock,
        copies=2,
    )
    return Pair(Asked(one), Asked(other), keeper, clock, adverts)


def of(asked: Asked, *holdings: Holding, others: Sequence[Asked] = (), **fields: Any) -> Advert:
    return advert(asked.peer.id, *holdings, others=[other.peer.id for other in others], **fields)


async def test_the_leader_asks_for_copies_once(peers: Peers) -> None:
    mesh = await pair(peers, leads=True)
    for _ in range(2):
        await mesh.look(of(mesh.first, held(0, 30)), of(mesh.second))
    await mesh.settled()
    (place,) = mesh.second.places
    assert (str(place.layers), place.standby, place.ref) == ("0-30", True, CARD.ref)


async def test_another_peer_stands_in_for_a_leader_that_does_nothing(peers: Peers) -> None:
    mesh = await pair(peers, leads=False)
    adverts = of(mesh.first), of(mesh.second, held(0, 30))
    await mesh.look(*adverts)
    mesh.clock.now += 5
    await mesh.look(*adverts)
    assert not mesh.first.places
    mesh.clock.now += 2
    await mesh.look(*adverts)
    await mesh.settled()
    assert len(mesh.first.places) == 1


async def test_one_that_leaves_asks_for_nothing(peers: Peers) -> None:
    mesh = await pair(peers, leads=True)
    await mesh.look(of(mesh.first, draining=True), of(mesh.second, held(0, 30)))
    assert not mesh.keeper._asked


async def test_the_next_in_line_leads_at_once_when_the_first_leaves(peers: Peers) -> None:
    mesh = await pair(peers, leads=False)
    await mesh.look(of(mesh.first), of(mesh.second, held(0, 30), draining=True))
    await mesh.settled()
    assert [place.standby for place in mesh.first.places] == [False]


async def test_who_refuses_is_asked_again_later_and_ever_later(peers: Peers) -> None:
    mesh = await pair(peers, leads=True)
    mesh.second.full = True
    adverts = of(mesh.first, held(0, 30)), of(mesh.second)
    asked_at = []
    for second in range(40):
        mesh.clock.now = 1000.0 + second
        before = len(mesh.second.places)
        await mesh.look(*adverts)
        await mesh.settled()
        if len(mesh.second.places) > before:
            asked_at.append(second)
    assert asked_at == [0, 5, 15, 35]


async def test_lost_layers_are_placed_anew(peers: Peers) -> None:
    mesh = await pair(peers, leads=True)
    gone = advert("gone", held(20, 30, pinned=True))
    await mesh.look(of(mesh.first, held(0, 20), memory=0), of(mesh.second, memory=1 << 20), gone)
    await mesh.look(of(mesh.first, held(0, 20), memory=0), of(mesh.second))
    await mesh.settled()
    assert {(str(place.layers), place.standby, place.pinned) for place in mesh.second.places} == {("20-30", False, True)}


async def test_a_copy_of_a_model_that_was_unplaced_is_let_go(peers: Peers) -> None:
    mesh = await pair(peers, leads=True)
    await mesh.look(of(mesh.first, held(0, 30)), of(mesh.second, held(0, 30, standby=True, state="loading")))
    await mesh.look(of(mesh.first), of(mesh.second, held(0, 30, standby=True)))
    assert mesh.second.unplaced == 1
    assert not mesh.second.places


async def test_a_faster_peer_that_joins_gets_the_model_once_its_links_are_measured(peers: Peers) -> None:
    mesh = await pair(peers, leads=True)
    serving = held(0, 30)
    mesh.keeper.copies = 1
    await mesh.look(of(mesh.first, serving))
    await mesh.look(of(mesh.first, serving), of(mesh.second, gb_s=40.0))
    await mesh.look(of(mesh.first, serving, others=[mesh.second]), of(mesh.second, gb_s=40.0, others=[mesh.first]))
    assert not mesh.second.places
    mesh.clock.now += 11
    await mesh.look(of(mesh.first, serving, others=[mesh.second]), of(mesh.second, gb_s=40.0, others=[mesh.first]))
    await mesh.settled()
    assert {place.standby for place in mesh.second.places} == {False}
    count = len(mesh.second.places)
    mesh.clock.now += 11
    await mesh.look(of(mesh.first, serving, others=[mesh.second]), of(mesh.second, gb_s=40.0, others=[mesh.first]))
    await mesh.settled()
    assert len(mesh.second.places) == count
