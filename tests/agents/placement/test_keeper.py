"""The keeper: which peer sends PLACE and UNPLACE requests, when, and how long it waits after a refusal."""

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
class Recipient:
    """A peer that records the PLACE and UNPLACE requests that it receives, and refuses PLACE while `full`."""

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
    """Two linked peers, the first with a keeper, and their adverts."""

    first: Recipient
    second: Recipient
    keeper: Keeper
    clock: SetClock
    adverts: list[Advert]

    async def check(self, *adverts: Advert) -> None:
        self.adverts[:] = adverts
        await self.keeper._check()

    async def settled(self) -> None:
        await until(lambda: not self.keeper._asked)


async def start_pair(peers: Peers, *, leads: bool) -> Pair:
    """Start two peers; with `leads`, the one with the keeper has the smaller id."""
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
    return Pair(Recipient(one), Recipient(other), keeper, clock, adverts)


def of(recipient: Recipient, *holdings: Holding, others: Sequence[Recipient] = (), **fields: Any) -> Advert:
    return advert(recipient.peer.id, *holdings, others=[other.peer.id for other in others], **fields)


async def test_the_leader_asks_for_copies_once(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    for _ in range(2):
        await pair.check(of(pair.first, held(0, 30)), of(pair.second))
    await pair.settled()
    (place,) = pair.second.places
    assert (str(place.layers), place.standby, place.ref) == ("0-30", True, ""), "the path of a file of this device is not told"


async def test_another_peer_stands_in_for_a_leader_that_does_nothing(peers: Peers) -> None:
    pair = await start_pair(peers, leads=False)
    adverts = of(pair.first), of(pair.second, held(0, 30))
    await pair.check(*adverts)
    pair.clock.now += 5
    await pair.check(*adverts)
    assert not pair.first.places
    pair.clock.now += 2
    await pair.check(*adverts)
    await pair.settled()
    assert len(pair.first.places) == 1


async def test_a_draining_peer_sends_no_requests(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    await pair.check(of(pair.first, draining=True), of(pair.second, held(0, 30)))
    assert not pair.keeper._asked


async def test_the_next_in_line_leads_at_once_when_the_leader_drains(peers: Peers) -> None:
    pair = await start_pair(peers, leads=False)
    await pair.check(of(pair.first), of(pair.second, held(0, 30), draining=True))
    await pair.settled()
    assert [place.standby for place in pair.first.places] == [False]


async def test_a_peer_that_refuses_is_asked_again_after_growing_delays(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    pair.second.full = True
    adverts = of(pair.first, held(0, 30)), of(pair.second)
    asked_at = []
    for second in range(40):
        pair.clock.now = 1000.0 + second
        before = len(pair.second.places)
        await pair.check(*adverts)
        await pair.settled()
        if len(pair.second.places) > before:
            asked_at.append(second)
    assert asked_at == [0, 5, 15, 35]


async def test_lost_layers_are_placed_on_another_peer(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    gone = advert("gone", held(20, 30, pinned=True))
    await pair.check(of(pair.first, held(0, 20), memory=0), of(pair.second, memory=1 << 20), gone)
    await pair.check(of(pair.first, held(0, 20), memory=0), of(pair.second))
    await pair.settled()
    assert {(str(place.layers), place.standby, place.pinned) for place in pair.second.places} == {("20-30", False, True)}


async def test_a_copy_of_an_unplaced_model_is_unplaced(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    await pair.check(of(pair.first, held(0, 30)), of(pair.second, held(0, 30, standby=True, state="loading")))
    await pair.check(of(pair.first), of(pair.second, held(0, 30, standby=True)))
    assert pair.second.unplaced == 1
    assert not pair.second.places


async def test_a_model_of_which_some_peers_have_unloaded_their_layers_and_others_not_yet_is_left_alone(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    await pair.check(of(pair.first, held(0, 17)), of(pair.second, held(17, 30), held(0, 17, standby=True)))
    await pair.settled()
    pair.first.places.clear()
    pair.second.places.clear()
    pair.keeper.placements.end(CARD.id)
    half = of(pair.first), of(pair.second, held(17, 30), held(0, 17, standby=True))
    for _ in range(5):
        await pair.check(*half)
        await pair.settled()
        pair.clock.now += 1.9
    assert not pair.first.places
    assert not pair.second.places


async def test_a_model_that_was_unplaced_and_is_placed_on_another_peer_is_kept_again(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    pair.keeper.placements.end(CARD.id)
    await pair.check(of(pair.first), of(pair.second))
    pair.clock.now += 11
    adverts = of(pair.first), of(pair.second, held(0, 30))
    await pair.check(*adverts)
    await pair.check(*adverts)
    await pair.settled()
    assert CARD.id not in pair.keeper.placements.unplaced
    assert pair.first.places
    assert all(place.standby for place in pair.first.places)


async def test_a_model_that_is_being_unplaced_gets_no_faster_peer(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    pair.keeper.copies = 1
    await pair.check(of(pair.first, held(0, 30)))
    pair.keeper.placements.end(CARD.id)
    pair.clock.now += 11
    await pair.check(of(pair.first, held(0, 30), others=[pair.second]), of(pair.second, gb_s=40.0, others=[pair.first]))
    await pair.settled()
    assert not pair.second.places


async def test_a_faster_peer_that_joins_gets_the_model_once_its_links_are_measured(peers: Peers) -> None:
    pair = await start_pair(peers, leads=True)
    serving = held(0, 30)
    pair.keeper.copies = 1
    await pair.check(of(pair.first, serving))
    await pair.check(of(pair.first, serving), of(pair.second, gb_s=40.0))
    await pair.check(of(pair.first, serving, others=[pair.second]), of(pair.second, gb_s=40.0, others=[pair.first]))
    assert not pair.second.places
    pair.clock.now += 11
    await pair.check(of(pair.first, serving, others=[pair.second]), of(pair.second, gb_s=40.0, others=[pair.first]))
    await pair.settled()
    assert {place.standby for place in pair.second.places} == {False}
    count = len(pair.second.places)
    pair.clock.now += 11
    await pair.check(of(pair.first, serving, others=[pair.second]), of(pair.second, gb_s=40.0, others=[pair.first]))
    await pair.settled()
    assert len(pair.second.places) == count
