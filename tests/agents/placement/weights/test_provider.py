"""Weights from peer to peer, over real links and real disks: only what is needed, checked before use."""

import hashlib
import shutil
from collections.abc import Callable

import msgspec
import pytest

from in_process.weights import LAYERS, REF, Sites, check_tensors, layer_bytes, other_sums
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.clock import SystemClock
from meshd.errors import DownloadError, ModelFileError, StorageError
from meshd.models.files import disk as files
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import HEADER, Manifest, Offer, Part
from meshd.models.store.store import Store
from meshd.types import LayerRange
from tiny.gguf_file import write_gguf


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
    a.server.change_offer = HOSTILE[what]
    if what == "a header that is none":
        a.server.spoil = lambda data: bytes(len(data))
    with pytest.raises(DownloadError):
        await b.fill(card, 1, 2)
    assert b.sources.candidates(card.id) == []
    copy = b.store.partials.get(card.id)
    assert copy is None or copy.have == {0}
    assert b.library.local == {}


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
    a.server.change_offer = other_sums
    with pytest.raises(DownloadError):
        await c.fill(card, 1, 2)
    await sites.have_file(b)
    await c.fill(card, 1, 2)
    check_tensors(c, sites, card, 1, 2)


async def test_a_disk_without_room_is_one_clear_error(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    given = a.server.given
    with pytest.raises(StorageError, match="too little room"):
        await b.fill(card, 0, 3)
    assert a.server.given == given


async def test_a_copy_that_is_removed_meanwhile_is_one_error_and_can_be_begun_again(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    assert b.store.remove(card.id) > 0
    with pytest.raises(ModelFileError, match="has gone"):
        b.library.open(card)
    await b.fill(card, 0, 1)
    check_tensors(b, sites, card, 0, 1)
