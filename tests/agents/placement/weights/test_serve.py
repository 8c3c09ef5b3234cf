"""Serving weights to other peers: the rate limit, and which bytes are sent."""

import asyncio
from collections.abc import Callable

import pytest

from in_process.peers import WAIT_S
from in_process.weights import Site, Sites
from meshd.agents.placement.weights.serve import SHARE, RateLimiter
from meshd.agents.placement.weights.transfer import CHUNK_BYTES
from meshd.clock import SystemClock
from meshd.errors import Overloaded, RemoteFailure
from meshd.models.files.manifest import Manifest
from meshd.models.store.store import StoredModel
from meshd.protocol.messages import FetchManifest, FetchWeights
from meshd.types import LinkStats, ModelId, PeerId


class PacedClock(SystemClock):
    """Time passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def test_weights_get_a_share_of_the_link_while_sessions_run() -> None:
    clock, running = PacedClock(), True
    links = {PeerId("b"): LinkStats(rtt_s=0.001, bandwidth_bytes_s=1e6), PeerId("c"): LinkStats(rtt_s=0.001, bandwidth_bytes_s=4e6)}
    pace = RateLimiter(clock, busy=lambda: running, link_stats=lambda: links)
    for _ in range(21):
        await pace.wait(PeerId("b"), 100_000)
    took = clock.now - 100.0
    assert took == pytest.approx(20 * 100_000 / (SHARE * 1e6))
    for _ in range(20):
        await pace.wait(PeerId("c"), 100_000)
    assert clock.now - 100.0 - took == pytest.approx(100_000 / (SHARE * 1e6) + 19 * 100_000 / (SHARE * 4e6))
    running = False
    before = clock.now
    for _ in range(100):
        await pace.wait(PeerId("b"), 100_000)
    assert clock.now == before


async def test_a_peer_that_would_wait_too_long_is_refused() -> None:
    pace = RateLimiter(PacedClock(), busy=lambda: True, link_stats=dict)
    pace.clock.sleep = asyncio.sleep  # type: ignore[method-assign]
    waiting = [asyncio.create_task(pace.wait(PeerId("b"), CHUNK_BYTES)) for _ in range(400)]
    done, pending = await asyncio.wait(waiting, timeout=0.05)
    refused = [task for task in done if isinstance(task.exception(), Overloaded)]
    assert 200 < len(refused) < 400
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def test_hashing_stops_when_the_server_closes(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_only_bytes_on_this_disk_are_sent_and_only_so_many_at_once(sites: Sites) -> None:
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
    wrong = [(b, there.offset, 1), (b, there.offset - 1, 2), (a, len(content) - 1, 2), (a, 1 << 52, 1)]
    wrong += [(a, 0, 0), (a, 0, CHUNK_BYTES + 1)]
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
        await c.peer.links.request(
            a.peer.id, lambda number: FetchManifest(request=number, model=ModelId("f" * 32)), timeout_s=WAIT_S
        )
