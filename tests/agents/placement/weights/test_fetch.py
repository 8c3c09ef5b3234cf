"""Fetching from several sources at once, including slow, corrupt and lost ones."""

import asyncio
import errno
import logging
import os
from types import SimpleNamespace

import pytest

from in_process.peers import until
from in_process.weights import Sites, check_tensors
from meshd.agents.placement.weights.serve import RateLimiter
from meshd.agents.placement.weights.transfer import CHUNK_BYTES
from meshd.errors import DownloadError, Overloaded, StorageError
from meshd.types import PeerId


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


async def test_a_source_with_only_some_layers_sends_those(sites: Sites) -> None:
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


async def test_a_fetch_waits_for_layers_that_a_source_is_still_fetching(sites: Sites) -> None:
    """The peer `a` has the file but is slow. `b` fetches it from `a` while `c` fetches it from `a` and `b`."""
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a)
    a.server.sleep_s = 0.05
    b.holds(card, 0, 6)
    await asyncio.gather(b.fill(card, 0, 6), c.fill(card, 0, 6))
    for site in (b, c):
        stored = site.store.get(card.id)
        assert stored is not None
        assert stored.path.read_bytes() == sites.file.read_bytes()


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


async def test_a_source_that_sends_wrong_bytes_is_logged_and_not_asked_again(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, c = await sites.start("a", "b", "c")
    card = await sites.have_file(a, b)
    await c.fill(card, 0, 1)
    a.server.spoil = flip
    a.server.sleep_s = b.server.sleep_s = 0.01
    with caplog.at_level(logging.WARNING):
        await c.fill(card, 1, 5)
    check_tensors(c, sites, card, 0, 5)
    assert f"a ({a.peer.id:.8}) is not asked for weights any more: it gave wrong bytes for blk." in caplog.text
    assert "wrong hash" in caplog.text
    assert f"b ({b.peer.id:.8}) is not asked" not in caplog.text
    assert c.sources.candidates(card.id) == [b.peer.id]


async def test_if_the_only_source_sends_wrong_bytes_the_fetch_fails_and_keeps_nothing(sites: Sites) -> None:
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


async def test_a_source_that_sends_too_few_bytes_is_not_asked_again(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.server.spoil = lambda data: data[:-1]
    with pytest.raises(DownloadError):
        await b.fill(card, 0, 1)
    assert b.sources.candidates(card.id) == []


async def test_another_source_takes_over_from_one_that_dies(sites: Sites) -> None:
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


async def test_when_the_last_source_dies_the_fetch_fails_and_keeps_what_arrived(sites: Sites) -> None:
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


async def test_a_cancelled_fetch_continues_where_it_stopped(sites: Sites) -> None:
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
    await asyncio.sleep(0.1)  # the source still answers the requests in flight
    a.server.given, a.server.sleep_s = 0, 0.0
    await b.fill(card, 0, 5)
    check_tensors(b, sites, card, 0, 5)
    again = b.store.partials.get(card.id)
    assert again is not None
    assert a.server.given == again.bytes_here - came


async def test_a_full_disk_fails_the_fetch_with_a_clear_error(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
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
