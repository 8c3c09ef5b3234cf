"""Weights between peers, over real links and real disks: only the needed tensors, checked before use."""

import hashlib
import shutil
from collections.abc import Callable

import msgspec
import pytest

from in_process.weights import LAYERS, REF, Sites, check_tensors, layer_bytes, other_sums
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.clock import SystemClock
from meshd.errors import DownloadError, ModelFileError, StorageError
from meshd.models.files import disk as files
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import HEADER, Manifest, Offer, Part
from meshd.models.store.store import Store
from meshd.types import LayerRange
from tiny.gguf_file import write_gguf


async def test_a_peer_fetches_the_header_and_its_own_layers_only(sites: Sites) -> None:
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


async def test_a_whole_model_is_assembled_from_two_peers_with_parts(sites: Sites) -> None:
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


async def test_a_model_on_this_disk_is_not_fetched(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a, b)
    await b.weights.fill(card, REF, LayerRange(0, 6), b.shares.append)
    assert a.server.given == 0
    assert b.shares == []


async def test_a_removed_file_is_fetched_from_peers(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a, b)
    b.store.list()[0].path.unlink()
    await b.weights.fill(card, REF, LayerRange(1, 2), b.shares.append)
    assert b.library.local == {}
    check_tensors(b, sites, card, 1, 2)


async def test_card_and_header_come_from_a_partial_copy_too(sites: Sites) -> None:
    """The model has no tokenizer, so only the bytes of its header can be compared."""
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    await b.fill(card, 2, 4)
    b.holds(card, 2, 4)
    assert card.id in c.library.cards()
    await a.die()
    assert c.library.cards()[card.id] == card
    with GgufFile.open(sites.file) as file:
        assert await c.library.headers.fetch(card) == file.header_bytes()
    b.holdings = ()
    assert c.library.cards() == {}


async def test_a_partial_copy_is_found_again_after_a_restart(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 2, 4)
    await a.die()
    store, headers = Store(sites.root / "models-b"), HeaderFetcher(b.peer.links, b.sources)
    again = ModelLibrary(links=b.peer.links, store=store, adverts=list, on_change=lambda: None, headers=headers)
    await again.refresh()
    assert again.local == {}
    assert again.cards() == {card.id: card}
    anew = WeightProvider(b.peer.links, again, b.sources, SystemClock())
    assert await anew.card(card.id, REF) == card
    await anew.fill(card, REF, LayerRange(2, 4), b.shares.append)
    with pytest.raises(DownloadError):
        await anew.fill(card, REF, LayerRange(2, 5), b.shares.append)


def other_layout(offer: Offer) -> Offer:
    """Move the border between two tensors of the manifest, so that it contradicts the file's header."""
    head, first, second, *parts = offer.manifest.parts
    longer = msgspec.structs.replace(first, length=first.length + 32)
    shorter = msgspec.structs.replace(second, offset=second.offset + 32, length=second.length - 32)
    return Offer(Manifest((head, longer, shorter, *parts)), offer.have)


HOSTILE: dict[str, Callable[[Offer], Offer]] = {
    "overlapping tensors": lambda offer: Offer(Manifest((Part(HEADER, 0, 100, bytes(32)), Part("a", 50, 100, bytes(32))))),
    "a tensor beyond any file size": lambda offer: Offer(
        Manifest((Part(HEADER, 0, 100, bytes(32)), Part("a", 100, 1 << 62, bytes(32))))
    ),
    "an invalid header": lambda offer: Offer(
        Manifest((Part(HEADER, 0, 64, hashlib.sha256(bytes(64)).digest()), Part("a", 64, 100, bytes(32))))
    ),
    "another layout": other_layout,
    "other hashes": other_sums,
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_manifest_fails_with_a_clear_error_and_leaves_nothing(sites: Sites, what: str) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.server.change_offer = HOSTILE[what]
    if what == "an invalid header":
        a.server.spoil = lambda data: bytes(len(data))
    with pytest.raises(DownloadError):
        await b.fill(card, 1, 2)
    assert b.sources.candidates(card.id) == []
    copy = b.store.partials.get(card.id)
    assert copy is None or copy.have == {0}
    assert b.library.local == {}


async def test_a_complete_copy_with_the_wrong_hash_is_deleted(sites: Sites) -> None:
    """The only source offers a valid manifest, but of another file."""
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


async def test_a_copy_that_was_begun_with_a_wrong_manifest_is_begun_again(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    a.server.change_offer = other_sums
    with pytest.raises(DownloadError):
        await c.fill(card, 1, 2)
    await sites.have_file(b)
    await c.fill(card, 1, 2)
    check_tensors(c, sites, card, 1, 2)


async def test_a_disk_without_room_fails_before_anything_is_fetched(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    given = a.server.given
    with pytest.raises(StorageError, match="too little room"):
        await b.fill(card, 0, 3)
    assert a.server.given == given


async def test_a_removed_copy_fails_to_open_and_can_be_fetched_again(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    await b.fill(card, 0, 1)
    assert b.store.remove(card.id) > 0
    with pytest.raises(ModelFileError, match="has gone"):
        b.library.open(card)
    await b.fill(card, 0, 1)
    check_tensors(b, sites, card, 0, 1)
