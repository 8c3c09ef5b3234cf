"""Peers with real links and real disks that fetch weights from each other, in one process."""

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from in_process.peers import WAIT_S, Peer, Peers, until
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.serve import RateLimiter, WeightServer
from meshd.agents.placement.weights.sources import WeightSources
from meshd.clock import SystemClock
from meshd.models.cards import shown_to_peers
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import Manifest, Offer
from meshd.models.store.store import Store
from meshd.protocol.messages import FetchWeights
from meshd.types import Advert, Capability, Holding, LayerRange, LinkStats, ModelCard, ModelId, PeerId, Rates
from tiny.gguf_file import write_gguf

LAYERS = 6
REF = "file:/nowhere/tiny.gguf"
"""A reference that can't be downloaded, so that other peers are the only source."""
CAPABILITY = Capability(
    backend="none",
    processor="none",
    threads=1,
    memory_total_bytes=0,
    memory_free_bytes=0,
    rates=Rates(decode_bytes_s=1, prefill_flops_s=1, memory_bytes_s=1, attention_bytes_s=1, disk_bytes_s=1, layer_overhead_s=0),
)


class Server(WeightServer):
    """A weight server that a test makes slow, unreachable or wrong."""

    given = 0
    """Bytes of weights sent so far."""
    sleep_s = 0.0
    """Delay before each reply."""
    die_after: int | None = None
    """Bytes after which `on_dying` is called once. None: never."""
    on_dying: Callable[[], None]
    spoil: Callable[[bytes], bytes] = staticmethod(lambda data: data)
    """Changes the bytes of each reply."""
    change_offer: Callable[[Offer], Offer] = staticmethod(lambda offer: offer)
    """Changes each offered manifest."""

    async def _on_fetch_weights(self, sender: PeerId, message: FetchWeights, payload: memoryview) -> Any:
        await asyncio.sleep(self.sleep_s)
        if self.die_after is not None and self.given >= self.die_after:
            self.die_after = None
            self.on_dying()
        reply, data = await super()._on_fetch_weights(sender, message, payload)
        self.given += len(data)
        return reply, self.spoil(data)

    async def _offer(self, model: ModelId) -> Offer:
        return self.change_offer(await super()._offer(model))


@dataclass
class Site:
    """A peer with links, a disk and a library, which serves and fetches weights."""

    name: str
    peer: Peer
    store: Store
    library: ModelLibrary
    server: Server
    sources: WeightSources
    weights: WeightProvider
    holdings: tuple[Holding, ...] = ()
    bandwidths: dict[PeerId, float] = field(default_factory=dict)
    alive: bool = True
    shares: list[float] = field(default_factory=list)

    def advert(self) -> Advert:
        links = {peer: LinkStats(rtt_s=0.001, bandwidth_bytes_s=figure) for peer, figure in self.bandwidths.items()}
        models = tuple(map(shown_to_peers, self.library.local.values()))
        return Advert(
            peer=self.peer.id,
            name=self.name,
            incarnation=1,
            revision=1,
            version="",
            capability=CAPABILITY,
            holdings=self.holdings,
            models=models,
            links=links,
        )

    async def fill(self, card: ModelCard, start: int, end: int) -> None:
        """Fetch the card, then the layers, as a placement does."""
        self.shares.clear()
        async with asyncio.timeout(4 * WAIT_S):
            known = await self.weights.card(card.id, REF)
            await self.weights.fill(known, REF, LayerRange(start, end), self.shares.append)

    def holds(self, card: ModelCard, start: int, end: int) -> None:
        self.holdings = (Holding(model=card.id, layers=LayerRange(start, end), state="active"),)

    async def die(self) -> None:
        self.alive = False
        await self.server.close()
        await self.peer.stop()


class Sites:
    """Starts peers and links each new one with all others."""

    def __init__(self, peers: Peers, root: Path) -> None:
        self.peers = peers
        self.root = root
        self.all: dict[str, Site] = {}
        self.file = write_gguf(root / "tiny.gguf", layers=LAYERS)

    def name_of(self, peer: PeerId) -> str:
        return next((site.name for site in self.all.values() if site.peer.id == peer), peer)

    def adverts(self, me: str) -> list[Advert]:
        return [site.advert() for site in self.all.values() if site.alive and site.name != me]

    async def start(self, *names: str) -> list[Site]:
        return [await self._start(name) for name in names]

    async def _start(self, name: str) -> Site:
        clock = SystemClock()
        peer = self.peers.start(name)
        store = Store(self.root / f"models-{name}", self.root / "hf", index_url="http://127.0.0.1:9/simple")
        sources = WeightSources(
            me=peer.id, links=peer.links, adverts=lambda: self.adverts(name), names=self.name_of, clock=clock, link_stats=dict
        )
        library = ModelLibrary(
            links=peer.links,
            store=store,
            adverts=lambda: self.adverts(name),
            on_change=lambda: None,
            headers=HeaderFetcher(peer.links, sources),
        )
        server = Server(peer.links, library, RateLimiter(clock, busy=lambda: False, link_stats=dict))
        site = Site(name, peer, store, library, server, sources, WeightProvider(peer.links, library, sources, clock))
        library.register()
        server.register()
        others = [other for other in self.all.values() if other.alive]
        for other in others:
            peer.dial(other.peer)
        self.all[name] = site
        await until(lambda: all(peer.id in other.peer.links.peers() for other in others))
        return site

    async def have_file(self, *sites: Site) -> ModelCard:
        """Put a copy of the model's file on the disk of each site. Returns: the model's card as other peers see it."""
        for site in sites:
            own = self.root / f"{site.name}.gguf"
            shutil.copyfile(self.file, own)
            await site.library.pull(f"file:{own}", lambda share: None, by_owner=True)
        [card] = sites[0].library.local.values()
        return shown_to_peers(card)


def layer_bytes(card: ModelCard, start: int, end: int) -> int:
    return sum(card.layer_bytes[start:end])


def check_tensors(site: Site, sites: Sites, card: ModelCard, start: int, end: int) -> None:
    """Check that the tensors of these layers on the site's disk equal those of the model's file."""
    needed = {f"blk.{layer}." for layer in range(start, end)}
    ends = {"token_embd.weight"} if start == 0 else set()
    ends |= {"output_norm.weight", "token_embd.weight"} if end == LAYERS else set()
    with site.library.open(card) as mapped, GgufFile.open(sites.file) as file:
        for name in file.tensors:
            if name in ends or any(name.startswith(prefix) for prefix in needed):
                assert bytes(mapped.tensor(name).data) == bytes(file.tensor(name).data), name


def other_sums(offer: Offer) -> Offer:
    """Replace the SHA-256 of each tensor in the offer."""
    head, *parts = offer.manifest.parts
    return Offer(Manifest((head, *(msgspec.structs.replace(part, sha256=bytes(32)) for part in parts))), offer.have)
