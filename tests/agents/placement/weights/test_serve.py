"""How fast weights are given to other peers; serving over real links is in test_provider.py."""

import asyncio

import pytest

from meshd.agents.placement.weights.serve import SHARE, RateLimiter
from meshd.agents.placement.weights.transfer import CHUNK_BYTES
from meshd.clock import SystemClock
from meshd.errors import Overloaded
from meshd.types import LinkStats, PeerId


class PacedClock(SystemClock):
    """Time passes only in sleeps."""

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
