"""A router over an invented cluster whose peers advertise themselves and load the layers that they are asked for."""

import asyncio
from typing import Any, cast

import msgspec

from in_process.clusters import make_adverts
from meshd.agents.links.links import Links
from meshd.agents.placement.client import PlacementClient
from meshd.agents.session.plan.route import Router
from meshd.clock import SystemClock
from meshd.errors import RemoteFailure
from meshd.models.store.store import Store
from meshd.planner.profile import PeerProfile
from meshd.protocol.messages import Message, Place, Placed, Request
from meshd.types import Advert, Holding, PeerId
from sim.peer.stand_ins import SimLibrary, SimStore


class Cluster:
    """Stands in for the links and the peer table of the peer that routes."""

    def __init__(self, *peers: PeerProfile, **fields: Any) -> None:
        self.adverts = {advert.peer: advert for advert in make_adverts(*peers, **fields)}
        self.suspects: list[Advert] = []
        self.asked: list[tuple[PeerId, Place]] = []
        self.refusing: dict[PeerId, str] = {}
        self.granting: int | None = None
        """Tokens that peers reserve KV for, whatever they are asked for. None: as asked."""
        self.load_s = 0.0
        self.advert_delay_s = 0.0
        """Seconds from the end of a load to the advert that shows it."""
        self._requests = 0
        names = {peer.id: peer.name for peer in peers}
        library = SimLibrary(cast("Links", self), cast("Store", SimStore(())), self.live, lambda: None, headers=cast("Any", None))
        self.placer = PlacementClient(
            links=cast("Links", self),
            library=library,
            adverts=self.live,
            names=lambda peer: names.get(peer, peer[:8]),
            clock=SystemClock(),
        )
        self.router = Router(
            me=peers[0].id,
            library=library,
            placer=self.placer,
            adverts=self.live,
            suspects=lambda: self.suspects,
        )

    def live(self) -> list[Advert]:
        return list(self.adverts.values())

    def lose(self, *names: str) -> frozenset[PeerId]:
        """Remove these peers. Returns: their ids."""
        gone = frozenset(PeerId(f"{name}-id") for name in names)
        for peer in gone:
            del self.adverts[peer]
        return gone

    def change(self, name: str, **fields: Any) -> None:
        """Change fields of a peer's advert."""
        peer = PeerId(f"{name}-id")
        self.adverts[peer] = msgspec.structs.replace(self.adverts[peer], **fields)

    def next_request(self) -> int:
        self._requests += 1
        return self._requests

    async def request(self, peer: PeerId, message: Request, *, timeout_s: float) -> tuple[Message, memoryview]:
        assert isinstance(message, Place)
        self.asked.append((peer, message))
        if self.granting is not None:
            message = msgspec.structs.replace(message, kv_tokens=self.granting)
        if peer in self.refusing:
            raise RemoteFailure("no more", remote_code=self.refusing[peer])
        advert = self.adverts[peer]
        self.adverts[peer] = msgspec.structs.replace(advert, holdings=(*advert.holdings, _holding(message, "loading")))
        await asyncio.sleep(self.load_s)
        if self.advert_delay_s:
            asyncio.get_running_loop().call_later(self.advert_delay_s, self._loaded, peer, message)
        else:
            self._loaded(peer, message)
        return Placed(request=message.request, layers=message.layers, kv_tokens=message.kv_tokens), memoryview(b"")

    def _loaded(self, peer: PeerId, request: Place) -> None:
        advert = self.adverts[peer]
        self.adverts[peer] = msgspec.structs.replace(advert, holdings=(*advert.holdings[:-1], _holding(request, "active")))


def _holding(request: Place, state: str) -> Holding:
    return Holding(
        model=request.model,
        layers=request.layers,
        state=state,
        progress=1.0 if state == "active" else 0.5,
        kv_tokens_total=request.kv_tokens,
        kv_tokens_free=request.kv_tokens,
    )
