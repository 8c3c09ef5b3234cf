"""What a peer loads again after a restart: what nobody else serves, until it succeeds, and no more than was recorded."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from in_process.adverts import CARD, advert, held
from in_process.clocks import SetClock
from meshd.agents.placement.restart.placements import PlacedLayers, Placements
from meshd.agents.placement.restart.restore import Restorer
from meshd.errors import MeshdError, OutOfMemory
from meshd.protocol.messages import Place
from meshd.state import MemoryFolder
from meshd.types import Advert, LayerRange, PeerId

ME = PeerId("me")


class QuickClock(SetClock):
    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


@dataclass
class Resident:
    card: Any
    layers: LayerRange
    kv_tokens: int = 64


@dataclass
class RecordedAgents:
    """Stands for the loader and the placer: `place` raises each of `failures` once, then succeeds."""

    failures: list[MeshdError] = field(default_factory=list)
    placed: list[tuple[str, int, bool, bool]] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    holding: list[Resident] = field(default_factory=list)

    async def place(self, request: Place, *, restored: bool) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.placed.append((str(request.layers), request.kv_tokens, request.pinned, restored))
        self.holding.append(Resident(CARD, request.layers))

    @property
    def residents(self) -> Any:
        return self

    def of(self, model: str) -> list[Resident]:
        return self.holding

    async def repair(self, card: Any, missing: tuple[LayerRange, ...], **how: Any) -> None:
        self.repaired += map(str, missing)


def entry(start: int, end: int) -> PlacedLayers:
    layers = LayerRange(start, end)
    return PlacedLayers(model=CARD.id, name=CARD.name, ref=CARD.ref, layers=layers, kv_tokens=64, pinned=True)


def holder(peer: str, *layers: tuple[int, int], **fields: Any) -> Advert:
    holdings = tuple(msgspec.structs.replace(held(*each, model=CARD.id), **fields) for each in layers)
    return msgspec.structs.replace(advert(peer), holdings=holdings)


def restorer(agents: RecordedAgents, adverts: list[Advert], *entries: PlacedLayers) -> Restorer:
    placements = Placements(MemoryFolder())
    for each in entries:
        placements.add(each)
    loader, placer = cast("Any", agents), cast("Any", agents)
    return Restorer(
        me=adverts[0].peer, placements=placements, loader=loader, placer=placer, adverts=lambda: adverts, clock=QuickClock()
    )


async def test_the_recorded_layers_are_loaded_as_they_were() -> None:
    agents = RecordedAgents()
    await restorer(agents, [advert("a")], entry(0, 10), entry(20, 30)).run()
    assert agents.placed == [("0-10", 64, True, True), ("20-30", 64, True, True)]


async def test_layers_that_another_peer_serves_meanwhile_are_not_loaded_and_their_entry_ends() -> None:
    agents = RecordedAgents()
    restore = restorer(agents, [advert("a"), holder("b", (0, 12))], entry(0, 10))
    await restore.run()
    assert (agents.placed, restore.placements.placed) == ([], ())


@pytest.mark.parametrize("fields", [{"standby": True}, {"state": "draining"}])
async def test_a_standby_copy_elsewhere_does_not_serve(fields: dict[str, Any]) -> None:
    agents = RecordedAgents()
    await restorer(agents, [advert("a"), holder("b", (0, 12), **fields)], entry(0, 10)).run()
    assert len(agents.placed) == 1


async def test_a_failed_load_is_tried_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    agents = RecordedAgents(failures=[OutOfMemory("no room")] * 3)
    await restorer(agents, [advert("a")], entry(0, 10)).run()
    assert len(agents.placed) == 1
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


async def test_an_entry_that_ends_while_it_waits_is_not_loaded() -> None:
    agents = RecordedAgents(failures=[OutOfMemory("no room")])
    restore = restorer(agents, [advert("a")], entry(0, 10))
    place = agents.place

    async def unplaced_meanwhile(request: Place, *, restored: bool) -> None:
        try:
            await place(request, restored=restored)
        finally:
            restore.placements.end(CARD.id)

    agents.place = unplaced_meanwhile  # type: ignore[method-assign]
    await restore.run()
    assert agents.placed == []


async def test_the_first_holder_places_the_layers_of_peers_that_do_not_return() -> None:
    for name, other, repaired in (("a", "b", ["20-30"]), ("b", "a", [])):
        agents = RecordedAgents()
        adverts = [holder(name, (0, 10)), holder(other, (10, 20))]
        adverts.sort(key=lambda each: each.name != name)
        await restorer(agents, adverts, entry(0, 10)).run()
        assert agents.repaired == repaired
