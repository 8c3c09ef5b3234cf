"""Headers of models from peers: only the one that the peers with the model agree on is used."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from in_process.peers import WAIT_S, Peers
from in_process.weights import Site, Sites
from meshd.agents.text.model_texts import ModelTexts
from meshd.errors import ModelFileError, NoPeer, PeerFault
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import Offer
from meshd.types import ModelCard, ModelId


@pytest.fixture
def sites(peers: Peers, tmp_path: Any) -> Sites:
    return Sites(peers, tmp_path)


def header_of(sites: Sites) -> bytes:
    with GgufFile.open(sites.file) as file:
        return bytes(file.header_bytes())


def forged(sites: Sites) -> bytes:
    """The header with another model name of the same length: still a valid header, with the same tensors."""
    true = header_of(sites)
    changed = true.replace(b"general.", b"generaI.", 1)
    assert changed != true
    return changed


def forge(site: Site, sites: Sites, monkeypatch: pytest.MonkeyPatch, *, manifest: bool = False) -> None:
    """Have a site send a forged header; with `manifest`, the manifest that fits it too."""
    monkeypatch.setattr(
        type(site.library), "_header_of", lambda library, card: forged(sites) if library is site.library else header_of(sites)
    )
    if manifest:

        def change(offer: Offer) -> Offer:
            import hashlib

            header, *others = offer.manifest.parts
            other = msgspec.structs.replace(header, sha256=hashlib.sha256(forged(sites)).digest())
            return msgspec.structs.replace(offer, manifest=msgspec.structs.replace(offer.manifest, parts=(other, *others)))

        site.server.change_offer = change


async def fetched(site: Site, card: ModelCard) -> bytes:
    async with asyncio.timeout(2 * WAIT_S):
        return await site.library.headers.fetch(card)


async def test_a_header_that_is_not_the_agreed_one_is_refused_and_the_next_peer_is_asked(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member with the model's tensors sends another chat template with them."""
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(b, c)
    forge(b, sites, monkeypatch)
    c.bandwidths, b.bandwidths = {a.peer.id: 1.0}, {a.peer.id: 1e9}
    assert await fetched(a, card) == header_of(sites)
    assert a.sources.is_banned(b.peer.id)
    await c.die()
    with pytest.raises((NoPeer, PeerFault)):
        await fetched(a, card)


async def test_the_majority_of_the_peers_with_the_file_decides(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = await sites.start("a", "b", "c", "d")
    card = await sites.have_file(b, c)
    forge(b, sites, monkeypatch, manifest=True)
    with pytest.raises(ModelFileError, match="do not agree"):
        await fetched(a, card)
    await sites.have_file(d)
    assert await fetched(a, card) == header_of(sites)
    assert a.sources.is_banned(b.peer.id)


async def test_a_text_from_a_wrong_header_is_forgotten_when_a_majority_has_another_one(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[ModelId, str | bytes] = {}

    async def get(texts: ModelTexts, card: ModelCard, source: Callable[[], Awaitable[str | bytes]]) -> str | bytes:
        """Keep what a text is read from, as `ModelTexts` keeps the text. The models of these tests have no tokenizer."""
        if card.id not in kept:
            kept[card.id] = await source()
        return kept[card.id]

    monkeypatch.setattr(ModelTexts, "get", get)
    monkeypatch.setattr(ModelTexts, "forget", lambda texts, model: kept.pop(model, None))
    a, b = await sites.start("a", "b")
    card = await sites.have_file(b)
    forge(b, sites, monkeypatch, manifest=True)
    assert await a.library.text(card) == forged(sites), "there is nobody else to ask"
    c, d = await sites.start("c", "d")
    await sites.have_file(c, d)
    assert await a.library.text(card) == header_of(sites)
