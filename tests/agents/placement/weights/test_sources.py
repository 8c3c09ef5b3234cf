"""Which peers are asked for weights, in which order, and which manifest is used when sources disagree."""

import asyncio
import logging

import pytest

from in_process.weights import Server, Sites, check_tensors, other_sums
from meshd.agents.placement.weights import serve as weight_server
from meshd.errors import DownloadError
from meshd.models.files.manifest import Manifest
from meshd.models.store.store import StoredModel


async def test_peers_with_the_file_come_first_and_then_the_best_links(sites: Sites) -> None:
    a, b, c, d = await sites.start("a", "b", "c", "d")
    card = await sites.have_file(a, b)
    c.holds(card, 0, 3)
    a.bandwidths, b.bandwidths, c.bandwidths = {d.peer.id: 1e6}, {d.peer.id: 1e8}, {d.peer.id: 1e9}
    assert d.sources.candidates(card.id) == [b.peer.id, a.peer.id, c.peer.id]
    a.bandwidths = {d.peer.id: 1e10}
    assert d.sources.candidates(card.id) == [a.peer.id, b.peer.id, c.peer.id]


async def test_tensors_on_a_disk_that_are_not_loaded_are_found_when_no_other_peer_has_them(sites: Sites) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    await b.fill(card, 0, 2)
    await c.fill(card, 2, 4)
    await a.die()
    assert c.sources.candidates(card.id) == []
    assert c.sources.candidates(card.id, everyone=True) == [b.peer.id]
    await c.fill(card, 1, 3)
    check_tensors(c, sites, card, 1, 4)


async def test_two_sources_that_disagree_are_not_used_until_a_third_decides(sites: Sites, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a, b)
    a.server.change_offer = other_sums
    with pytest.raises(DownloadError, match="a, b do not agree"):
        await c.fill(card, 1, 2)
    [d] = await sites.start("d")
    await sites.have_file(d)
    with caplog.at_level(logging.WARNING):
        await c.fill(card, 1, 2)
    check_tensors(c, sites, card, 1, 2)
    assert f"a ({a.peer.id:.8}) is not asked for weights any more" in caplog.text


async def test_a_fetch_waits_for_a_source_that_hashes_its_file(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    monkeypatch.setattr(weight_server, "_HASHING_WAIT_S", 0.01)
    made = asyncio.Event()
    make = a.server._make_manifest

    async def slowly(stored: StoredModel) -> Manifest:
        await made.wait()
        return await make(stored)

    monkeypatch.setattr(Server, "_make_manifest", lambda self, stored: slowly(stored))
    task = asyncio.create_task(b.fill(card, 0, 1))
    await asyncio.sleep(0.2)
    assert not task.done()
    made.set()
    await task
    check_tensors(b, sites, card, 0, 1)
