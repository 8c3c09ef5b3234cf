"""Measuring links: round trip and bandwidth."""

import asyncio

import pytest

from in_process.peers import QUICK, WAIT_S, Peers, until
from meshd.agents.links import probe as linkprobe
from meshd.agents.links.estimate import LinkEstimate
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
    assert stats.rtt_s / 2 <= stats.hop_s < 0.5
    assert 1e6 < stats.bandwidth_bytes_s < 1e12
    assert stats.measured_at > 0
    running.cancel()


async def test_a_second_request_joins_the_running_probe_and_little_is_sent(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await a.next_up()
    async with asyncio.timeout(WAIT_S):
        prober = LinkProber(a.links, SystemClock(), lambda: None)
        first, second = await asyncio.gather(prober.probe(b.id), prober.probe(b.id))
    assert first is not None
    assert first is second
    assert a.links.rows()[0]["bytes_out"] < 32 * 2**20


async def test_an_unlinked_peer_has_no_measurement(peers: Peers) -> None:
    a = peers.start("a")
    prober = LinkProber(a.links, SystemClock(), lambda: None)
    assert await prober.probe(PeerId("x" * 52)) is None
    assert prober.stats() == {}


async def test_the_probes_stop_growing_at_the_first_slow_size(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    a = peers.start("a")
    prober, estimate = LinkProber(a.links, SystemClock(), lambda: None), LinkEstimate()
    estimate.round_trip(0.0001, 0.0)
    asked: list[int] = []

    async def round_trip(peer: PeerId, payload: memoryview) -> float:
        asked.append(len(payload))
        return 0.0001 + len(payload) / 20e6

    monkeypatch.setattr(prober, "_round_trip", round_trip)
    await prober._ramp(a.id, estimate)
    assert estimate.bandwidth_bytes_s(0.0) == pytest.approx(20e6, rel=0.1)
    assert asked == list(linkprobe.RAMP_BYTES[:3])


async def test_a_probe_that_is_as_quick_as_a_heartbeat_shows_no_endless_bandwidth(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest heartbeats took longer than usual, so it looks as if bytes took no time at all."""
    a = peers.start("a")
    prober, estimate = LinkProber(a.links, SystemClock(), lambda: None), LinkEstimate()
    estimate.round_trip(0.020, SystemClock().monotonic())

    async def round_trip(peer: PeerId, payload: memoryview) -> float:
        return 0.019

    monkeypatch.setattr(prober, "_round_trip", round_trip)
    await prober._ramp(PeerId("b"), estimate)
    found = estimate.bandwidth_bytes_s(SystemClock().monotonic())
    assert found is not None
    assert found <= linkprobe.RAMP_BYTES[-1] / (0.05 * 0.019)


async def test_a_surprising_probe_is_confirmed_at_once(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    a = peers.start("a")
    clock = SystemClock()
    prober, estimate = LinkProber(a.links, clock, lambda: None), LinkEstimate()
    estimate.round_trip(0.0001, clock.monotonic())
    rate = 20e6
    asked: list[int] = []

    async def round_trip(peer: PeerId, payload: memoryview) -> float:
        asked.append(len(payload))
        return 0.0001 + len(payload) / rate

    monkeypatch.setattr(prober, "_round_trip", round_trip)
    await prober._check(a.id, estimate)
    await prober._check(a.id, estimate)
    assert len(asked) == 2
    rate = 2e6
    await prober._check(a.id, estimate)
    assert len(asked) > 3
    assert estimate.bandwidth_bytes_s(clock.monotonic()) == pytest.approx(2e6, rel=0.1)


async def test_round_trips_of_heartbeats_are_reported(peers: Peers) -> None:
    a, b = peers.start("a", timing=QUICK), peers.start("b", timing=QUICK)
    reported: list[tuple[PeerId, float]] = []
    prober = LinkProber(a.links, SystemClock(), lambda: None, lambda *trip: reported.append(trip))
    a.dial(b)
    await a.next_up()
    running = asyncio.create_task(prober.run())
    await until(lambda: len(reported) > 1)
    assert {peer for peer, _ in reported} == {b.id}
    assert all(0 < seconds < WAIT_S for _, seconds in reported)
    running.cancel()
