"""Weights from peer to peer, over real links and real disks: only what is needed, from several at once, and nothing on trust."""

import asyncio
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from in_process.peers import WAIT_S, Peer, Peers, until
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights import fetch as weight_fetch
from meshd.agents.placement.weights import serve as weight_server
from meshd.agents.placement.weights import sources as weight_sources
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.serve import RateLimiter, WeightServer
from meshd.agents.placement.weights.sources import WeightSources
from meshd.agents.placement.weights.transfer import CHUNK_BYTES
from meshd.clock import SystemClock
from meshd.errors import DownloadError, ModelFileError, Overloaded, RemoteFailure, StorageError
from meshd.models.files import disk as files
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import HEADER, Manifest, Offer, Part
from meshd.models.store.store import Store, StoredModel
from meshd.protocol.messages import FetchManifest, FetchWeights
from meshd.types import Advert, Capability, Holding, LayerRange, LinkStats, ModelCard, ModelId, PeerId, Rates
from tiny.gguf_file import write_gguf

LAYERS = 6
REF = "file:/nowhere/tiny.gguf"
"""No source but peers."""
CAPABILITY = Capability(
    backend="none",
    processor="none",
    threads=1,
    memory_total_bytes=0,
    memory_free_bytes=0,
    rates=Rates(decode_bytes_s=1, prefill_flops_s=1, memory_bytes_s=1, attention_bytes_s=1, disk_bytes_s=1, layer_overhead_s=0),
)


class Server(WeightServer):
    """A server that can be slow, die and lie."""

    given = 0
    """Bytes of weights."""
    sleep_s = 0.0
    die_after: int | None = None
    on_dying: Callable[[], None]
    spoil: Callable[[bytes], bytes] = staticmethod(lambda data: data)
    tell: Callable[[Offer], Offer] = staticmethod(lambda offer: offer)

    async def _on_fetch_weights(self, sender: PeerId, message: FetchWeights, payload: memoryview) -> Any:
        await asyncio.sleep(self.sleep_s)
        if self.die_after is not None and self.given >= self.die_after:
            self.die_after = None
            self.on_dying()
        reply, data = await super()._on_fetch_weights(sender, message, payload)
        self.given += len(data)
        return reply, self.spoil(data)

    async def _offer(self, model: ModelId) -> Offer:
        return self.tell(await super()._offer(model))


@dataclass
class Site:
    """One peer: links, disk, library, and both sides of weights."""

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
        models = tuple(self.library.local.values())
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
        """As a placement does; the card comes first."""
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
    """Starts peers that are linked with all others."""

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
        library = ModelLibrary(links=peer.links, store=store, adverts=lambda: self.adverts(name), on_change=lambda: None)
        server = Server(peer.links, library, RateLimiter(clock, busy=lambda: False, link_stats=dict))
        sources = WeightSources(
            me=peer.id, links=peer.links, adverts=lambda: self.adverts(name), names=self.name_of, clock=clock, link_stats=dict
        )
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
        """Put the model's file on their disks, each its own."""
        for site in sites:
            own = self.root / f"{site.name}.gguf"
            shutil.copyfile(self.file, own)
            await site.library.pull(f"file:{own}", lambda share: None)
        [card] = sites[0].library.local.values()
        return card


@pytest.fixture
async def sites(peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sites]:
    monkeypatch.setattr(weight_fetch, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(weight_fetch, "_PAUSE_S", 0.05)
    monkeypatch.setattr(weight_fetch, "_LOOK_S", 0.05)
    monkeypatch.setattr(weight_sources, "_GRACE_S", 0.3)
    started = Sites(peers, tmp_path)
    yield started
    for site in started.all.values():
        await site.server.close()


def layer_bytes(card: ModelCard, start: int, end: int) -> int:
    return sum(card.layer_bytes[start:end])


def check_tensors(site: Site, sites: Sites, card: ModelCard, start: int, end: int) -> None:
    """What a backend would read is what the file has, and nothing else can be read."""
    needed = {f"blk.{layer}." for layer in range(start, end)}
    ends = {"token_embd.weight"} if start == 0 else set()
    ends |= {"output_norm.weight", "token_embd.weight"} if end == LAYERS else set()
    with site.library.open(card) as mapped, GgufFile.open(sites.file) as file:
        for name in file.tensors:
            if name in ends or any(name.startswith(prefix) for prefix in needed):
                assert bytes(mapped.tensor(name).data) == bytes(file.tensor(name).data), name


# What comes


async def test_a_peer_gets_the_header_and_its_layers_and_nothing_else(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 2, 4)
    check_tensors(b, sites, card, 2, 4)
    copy = b.store.partials.get(card.id)
    assert copy is not None
    header = copy.about.manifest.parts[0].length
    assert a.server.given == header + layer_bytes(card, 2, 4) == copy.bytes_here
    assert b.library.local == {}
    assert b.library.partial == {card.id: msgspec.structs.replace(card, ref=card.ref)}
    assert b.shares == sorted(b.shares)
    assert b.shares[-1] == 1.0
    with b.library.open(card) as file, pytest.raises(ModelFileError, match="not on this disk"):
        file.tensor("blk.4.attn_q.weight")
    given = a.server.given
    await b.fill(card, 2, 4)
    assert a.server.given == given
    await b.fill(card, 3, 6)
    assert a.server.given == given + layer_bytes(card, 4, 6) + card.head_bytes
    check_tensors(b, sites, card, 2, 6)


async def test_several_sources_share_the_work(sites: Sites) -> None:
    a, b, c, d = await sites.start("a", "b", "c", "d")
    card = await sites.have_file(a, b, c)
    for site in (a, b, c):
        site.server.sleep_s = 0.01
    await d.fill(card, 0, 5)
    check_tensors(d, sites, card, 0, 5)
    given = [site.server.given for site in (a, b, c)]
    assert min(given) > 0.15 * sum(given)
    copy = d.store.partials.get(card.id)
    assert copy is not None
    assert sum(given) == copy.bytes_here


async def test_a_slow_source_does_not_hold_up_the_others(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a, b)
    a.server.sleep_s = 30.0
    await c.fill(card, 0, 3)
    check_tensors(c, sites, card, 0, 3)
    assert a.server.given == 0


async def test_the_best_link_comes_first_among_those_with_the_file(sites: Sites) -> None:
    a, b, c, d = await sites.start("a", "b", "c", "d")
    card = await sites.have_file(a, b)
    c.holds(card, 0, 3)
    a.bandwidths, b.bandwidths, c.bandwidths = {d.peer.id: 1e6}, {d.peer.id: 1e8}, {d.peer.id: 1e9}
    assert d.sources.candidates(card.id) == [b.peer.id, a.peer.id, c.peer.id]
    a.bandwidths = {d.peer.id: 1e10}
    assert d.sources.candidates(card.id) == [a.peer.id, b.peer.id, c.peer.id]


async def test_who_has_only_some_layers_gives_those(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    await b.fill(card, 0, 4)
    b.holds(card, 0, 4)
    await a.die()
    await c.fill(card, 1, 3)
    check_tensors(c, sites, card, 1, 3)
    with pytest.raises(DownloadError, match=r"no live peer can give blk\.4"):
        await c.fill(card, 1, 5)
    check_tensors(c, sites, card, 1, 4)


async def test_two_peers_with_parts_make_a_whole_model(sites: Sites) -> None:
    a, b, c, d = await sites.start("a", "b", "c", "d")
    card = await sites.have_file(a)
    await b.fill(card, 0, 3)
    await c.fill(card, 3, 6)
    b.holds(card, 0, 3)
    c.holds(card, 3, 6)
    await a.die()
    await d.fill(card, 0, 6)
    stored = d.store.get(card.id)
    assert stored is not None
    assert stored.path.read_bytes() == sites.file.read_bytes()
    assert list(d.library.local) == [card.id]
    assert d.library.partial == {}
    assert d.store.partials.list() == []
    assert b.server.given >= layer_bytes(card, 0, 3)
    assert c.server.given >= layer_bytes(card, 3, 6)


async def test_layers_that_a_source_is_still_getting_are_waited_for(sites: Sites) -> None:
    """One source has the file, but is slow; the other gets it from there at the same time."""
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    a.server.sleep_s = 0.05
    b.holds(card, 0, 6)
    await asyncio.gather(b.fill(card, 0, 6), c.fill(card, 0, 6))
    for site in (b, c):
        stored = site.store.get(card.id)
        assert stored is not None
        assert stored.path.read_bytes() == sites.file.read_bytes()


async def test_a_model_that_is_here_is_not_asked_for(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a, b)
    await b.weights.fill(card, REF, LayerRange(0, 6), b.shares.append)
    assert a.server.given == 0
    assert b.shares == []


async def test_a_file_that_someone_removed_is_fetched_from_peers(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a, b)
    b.store.list()[0].path.unlink()
    await b.weights.fill(card, REF, LayerRange(1, 2), b.shares.append)
    assert b.library.local == {}
    check_tensors(b, sites, card, 1, 2)


async def test_parts_that_lie_on_a_disk_and_are_not_loaded_are_found_when_nobody_else_has_them(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    await b.fill(card, 0, 2)
    await c.fill(card, 2, 4)
    await a.die()
    assert c.sources.candidates(card.id) == []
    assert c.sources.candidates(card.id, everyone=True) == [b.peer.id]
    await c.fill(card, 1, 3)
    check_tensors(c, sites, card, 1, 4)


async def test_text_and_header_come_from_a_part_too(sites: Sites) -> None:
    """Of a Llama without a tokenizer: only its header's bytes can be compared."""
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    await b.fill(card, 2, 4)
    b.holds(card, 2, 4)
    assert card.id in c.library.cards()
    await a.die()
    assert c.library.cards()[card.id] == card
    with GgufFile.open(sites.file) as file:
        assert await c.library._fetch_header(card) == file.header_bytes()
    b.holdings = ()
    assert c.library.cards() == {}


async def test_after_a_restart_what_is_here_is_known(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 2, 4)
    await a.die()
    again = ModelLibrary(links=b.peer.links, store=Store(sites.root / "models-b"), adverts=list, on_change=lambda: None)
    await again.refresh()
    assert again.local == {}
    assert again.cards() == {card.id: card}
    anew = WeightProvider(b.peer.links, again, b.sources, SystemClock())
    assert await anew.card(card.id, REF) == card
    await anew.fill(card, REF, LayerRange(2, 4), b.shares.append)
    with pytest.raises(DownloadError):
        await anew.fill(card, REF, LayerRange(2, 5), b.shares.append)


# What is not trusted


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


async def test_a_source_that_gives_wrong_bytes_is_named_and_not_asked_again(sites: Sites, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a, b)
    await c.fill(card, 0, 1)
    a.server.spoil = flip
    a.server.sleep_s = b.server.sleep_s = 0.01
    with caplog.at_level(logging.WARNING):
        await c.fill(card, 1, 5)
    check_tensors(c, sites, card, 0, 5)
    assert f"a ({a.peer.id:.8}) is not asked for weights any more: it gave wrong bytes for blk." in caplog.text
    assert "wrong sum" in caplog.text
    assert f"b ({b.peer.id:.8}) is not asked" not in caplog.text
    assert c.sources.candidates(card.id) == [b.peer.id]


async def test_wrong_bytes_alone_make_one_clear_error_and_nothing_is_kept(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    here = b.store.partials.get(card.id)
    a.server.spoil = flip
    with pytest.raises(DownloadError, match="no live peer can give"):
        await b.fill(card, 1, 3)
    again = b.store.partials.get(card.id)
    assert here is not None
    assert again is not None
    assert again.have == here.have


async def test_a_source_that_gives_too_little_is_not_asked_again(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.server.spoil = lambda data: data[:-1]
    with pytest.raises(DownloadError):
        await b.fill(card, 0, 1)
    assert b.sources.candidates(card.id) == []


def other_sums(offer: Offer) -> Offer:
    head, *parts = offer.manifest.parts
    return Offer(Manifest((head, *(msgspec.structs.replace(part, sha256=bytes(32)) for part in parts))), offer.have)


def other_layout(offer: Offer) -> Offer:
    """It makes sense in itself, but the header says otherwise."""
    head, first, second, *parts = offer.manifest.parts
    longer = msgspec.structs.replace(first, length=first.length + 32)
    shorter = msgspec.structs.replace(second, offset=second.offset + 32, length=second.length - 32)
    return Offer(Manifest((head, longer, shorter, *parts)), offer.have)


HOSTILE: dict[str, Callable[[Offer], Offer]] = {
    "tensors over one another": lambda offer: Offer(Manifest((Part(HEADER, 0, 100, bytes(32)), Part("a", 50, 100, bytes(32))))),
    "a tensor past all files": lambda offer: Offer(Manifest((Part(HEADER, 0, 100, bytes(32)), Part("a", 100, 1 << 62, bytes(32))))),
    "a header that is none": lambda offer: Offer(
        Manifest((Part(HEADER, 0, 64, hashlib.sha256(bytes(64)).digest()), Part("a", 64, 100, bytes(32))))
    ),
    "another layout": other_layout,
    "other sums": other_sums,
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_list_is_one_clear_error_and_leaves_nothing(sites: Sites, what: str) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.server.tell = HOSTILE[what]
    if what == "a header that is none":
        a.server.spoil = lambda data: bytes(len(data))
    with pytest.raises(DownloadError):
        await b.fill(card, 1, 2)
    assert b.sources.candidates(card.id) == []
    copy = b.store.partials.get(card.id)
    assert copy is None or copy.have == {0}
    assert b.library.local == {}


async def test_two_that_do_not_agree_are_not_believed_and_a_third_decides(sites: Sites, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a, b)
    a.server.tell = other_sums
    with pytest.raises(DownloadError, match="a, b do not agree"):
        await c.fill(card, 1, 2)
    [d] = await sites.start("d")
    await sites.have_file(d)
    with caplog.at_level(logging.WARNING):
        await c.fill(card, 1, 2)
    check_tensors(c, sites, card, 1, 2)
    assert f"a ({a.peer.id:.8}) is not asked for weights any more" in caplog.text


async def test_a_whole_model_of_wrong_sums_is_thrown_away(sites: Sites) -> None:
    """The one source agrees with itself on another file."""
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    other = write_gguf(sites.root / "other.gguf", layers=LAYERS, seed=1)
    [stored] = a.store.list()
    a.store._record(msgspec.structs.replace(stored, path=other, stamp=files.stamp_of(other)))
    with pytest.raises(DownloadError, match="another file"):
        await b.fill(card, 0, 6)
    assert b.store.list() == b.store.partials.list() == []
    assert b.library.local == b.library.partial == {}
    assert b.sources.candidates(card.id) == []


async def test_a_copy_that_was_begun_with_a_wrong_list_is_begun_anew(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    a.server.tell = other_sums
    with pytest.raises(DownloadError):
        await c.fill(card, 1, 2)
    await sites.have_file(b)
    await c.fill(card, 1, 2)
    check_tensors(c, sites, card, 1, 2)


# What breaks


async def test_a_source_that_dies_is_made_up_for_by_the_other(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a, b)
    a.server.sleep_s = b.server.sleep_s = 0.005
    dying: list[asyncio.Task[None]] = []
    a.server.die_after = 4 * CHUNK_BYTES
    a.server.on_dying = lambda: dying.append(asyncio.create_task(a.die()))
    await c.fill(card, 0, 5)
    check_tensors(c, sites, card, 0, 5)
    await dying[0]
    assert a.server.given >= 4 * CHUNK_BYTES
    assert b.server.given > 4 * CHUNK_BYTES


async def test_the_last_source_that_dies_is_one_clear_error_and_what_came_stays(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.server.sleep_s = 0.005
    dying: list[asyncio.Task[None]] = []
    a.server.die_after = 8 * CHUNK_BYTES
    a.server.on_dying = lambda: dying.append(asyncio.create_task(a.die()))
    with pytest.raises(DownloadError, match="no live peer can give"):
        await b.fill(card, 0, 5)
    await dying[0]
    copy = b.store.partials.get(card.id)
    assert copy is not None
    came = copy.bytes_here
    assert came > 4 * CHUNK_BYTES
    [c] = await sites.start("c")
    await sites.have_file(c)
    await b.fill(card, 0, 5)
    check_tensors(b, sites, card, 0, 5)
    again = b.store.partials.get(card.id)
    assert again is not None
    assert c.server.given == again.bytes_here - came


async def test_who_stops_in_the_middle_goes_on_from_there(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.server.sleep_s = 0.02
    task = asyncio.create_task(b.fill(card, 0, 5))
    await until(lambda: a.server.given > 6 * CHUNK_BYTES)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    copy = b.store.partials.get(card.id)
    assert copy is not None
    came = copy.bytes_here
    assert came > 2 * CHUNK_BYTES
    await asyncio.sleep(0.1)  # what was asked for last is still answered
    a.server.given, a.server.sleep_s = 0, 0.0
    await b.fill(card, 0, 5)
    check_tensors(b, sites, card, 0, 5)
    again = b.store.partials.get(card.id)
    assert again is not None
    assert a.server.given == again.bytes_here - came


async def test_a_source_that_hashes_its_file_is_waited_for(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    monkeypatch.setattr(weight_server, "_SUMS_WAIT_S", 0.01)
    made = asyncio.Event()
    make = a.server._make_sums

    async def slowly(stored: StoredModel) -> Manifest:
        await made.wait()
        return await make(stored)

    monkeypatch.setattr(Server, "_make_sums", lambda self, stored: slowly(stored))
    task = asyncio.create_task(b.fill(card, 0, 1))
    await asyncio.sleep(0.2)
    assert not task.done()
    made.set()
    await task
    check_tensors(b, sites, card, 0, 1)


async def test_sums_that_are_being_made_stop_with_the_peer(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless(model: StoredModel, advance: Callable[[int], None]) -> Manifest:
        loop.call_soon_threadsafe(begun.set)
        while True:
            advance(0)

    monkeypatch.setattr(a.store, "manifest", endless)
    task = asyncio.create_task(b.fill(card, 0, 1))
    async with asyncio.timeout(WAIT_S):
        await begun.wait()
        await a.server.close()
    task.cancel()


async def test_a_disk_without_room_is_one_clear_error(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    given = a.server.given
    with pytest.raises(StorageError, match="too little room"):
        await b.fill(card, 0, 3)
    assert a.server.given == given


async def test_a_disk_that_gets_full_is_one_clear_error(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("meshd.models.store.partial_copy.os", SimpleNamespace(**{**vars(os), "write": full}))
    with pytest.raises(StorageError, match="No space left"):
        await b.fill(card, 0, 3)
    monkeypatch.undo()
    await b.fill(card, 0, 3)
    check_tensors(b, sites, card, 0, 3)


async def test_a_copy_that_is_removed_meanwhile_is_one_error_and_can_be_begun_again(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    assert b.store.remove(card.id) > 0
    with pytest.raises(ModelFileError, match="has gone"):
        b.library.open(card)
    await b.fill(card, 0, 1)
    check_tensors(b, sites, card, 0, 1)


# What is given


async def test_only_bytes_that_are_here_are_given_and_few_at_once(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    await b.fill(card, 2, 3)
    manifest = a.store.manifest(a.store.list()[0], lambda count: None)
    here, there = (manifest.parts[min(manifest.indices([f"blk.{layer}.attn_q.weight"]))] for layer in (2, 3))

    async def ask(site: Site, offset: int, length: int, model: ModelId = card.id) -> bytes:
        question = FetchWeights(request=c.peer.links.next_request(), model=model, offset=offset, length=length)
        return bytes((await c.peer.links.request(site.peer.id, question, timeout_s=WAIT_S))[1])

    content = sites.file.read_bytes()
    for site in (a, b):
        assert await ask(site, here.offset, here.length) == content[here.offset : here.end]
    assert await ask(a, there.offset, there.length) == content[there.offset : there.end]
    wrong = [(b, there.offset, 1), (b, there.offset - 1, 2), (a, len(content) - 1, 2), (a, 1 << 62, 1), (a, -1, 1)]
    wrong += [(a, 0, 0), (a, 0, -1), (a, 0, CHUNK_BYTES + 1)]
    for site, offset, length in wrong:
        with pytest.raises(RemoteFailure, match=r"are not here|can't be asked for") as refused:
            await ask(site, offset, length)
        assert refused.value.remote_code == "invalid_value"
    await b.fill(card, 3, 4)
    assert await ask(b, there.offset, there.length) == content[there.offset : there.end]
    b.store.remove(card.id)
    for site, model in ((b, card.id), (a, ModelId("0" * 32))):
        with pytest.raises(RemoteFailure, match="nothing of that model"):
            await ask(site, there.offset, 1, model)
    with pytest.raises(RemoteFailure, match="nothing of that model"):
        await c.peer.links.request(a.peer.id, lambda number: FetchManifest(request=number, model=ModelId("../x")), timeout_s=WAIT_S)


async def test_a_busy_source_is_asked_again(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    refusals = 3

    async def wait(peer: PeerId, size_bytes: int) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Overloaded("busy")

    monkeypatch.setattr(RateLimiter, "wait", lambda self, peer, size_bytes: wait(peer, size_bytes))
    await b.fill(card, 0, 1)
    assert refusals == 0
    check_tensors(b, sites, card, 0, 1)
