"""Measuring links: round trip, hop and bandwidth."""

import asyncio

import pytest

from in_process.peers import WAIT_S, Peers
from meshd.agents.links import probe as linkprobe
from meshd.agents.links.probe import LinkProber
from meshd.clock import SystemClock
from meshd.types import PeerId


async def test_a_link_is_measured_when_it_comes_up(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    changed = asyncio.Event()
    prober = LinkProber(a.links, SystemClock(), changed.set)
    running = asyncio.create_task(prober.run())
    a.dial(b)
    async with asyncio.timeout(WAIT_S):
        prober.link_up(await a.next_up())
        await changed.wait()
    stats = prober.stats()[b.id]
    assert 0 < stats.rtt_s < 0.2
    assert stats.rtt_s / 4 < stats.hop_s < 0.5
    assert 1e6 < stats.bandwidth_bytes_s < 1e12
    assert stats.measured_at > 0
    prober.link_down(b.id)
    assert prober.stats() == {}
    running.cancel()


async def test_a_second_request_joins_the_running_probe_and_little_is_sent(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await a.next_up()
    async with asyncio.timeout(WAIT_S):
        prober = LinkProber(a.links, SystemClock(), lambda: None)
        first, second = await asyncio.gather(prober.probe(b.id), prober.probe(b.id))
    assert first is second is not None
    assert a.links.rows()[0]["bytes_out"] < 32 * 2**20


async def test_an_unlinked_peer_has_no_measurement(peers: Peers) -> None:
    a = peers.start("a")
    prober = LinkProber(a.links, SystemClock(), lambda: None)
    assert await prober.probe(PeerId("x" * 52)) is None
    assert prober.stats() == {}


async def test_the_probes_stop_growing_at_the_first_slow_size(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    a = peers.start("a")
    prober = LinkProber(a.links, SystemClock(), lambda: None)
    asked: list[int] = []

    async def round_trip(peer: PeerId, payload: memoryview, *, echo: bool) -> float:
        asked.append(len(payload))
        return 0.010 + len(payload) / 10e6

    monkeypatch.setattr(prober, "_round_trip", round_trip)
    bandwidth = await prober._bandwidth(a.id, 0.010)
    assert abs(bandwidth - 10e6) < 1
    assert asked == list(linkprobe.RAMP_BYTES[:3])
