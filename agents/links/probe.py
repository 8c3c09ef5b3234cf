"""Measures this peer's links: round-trip time, hop time of one activation, and bandwidth to the other peer.

A measurement sends three series of PROBE. Empty probes give the round-trip time, echoed probes of an activation's size give the
hop time, and probes of growing size give the bandwidth. Together they send less than 32 MiB, usually within a second. The sizes
grow only until a probe takes longer than a step may be delayed.
"""

import asyncio
import logging
import statistics
from collections.abc import Callable

from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.framing import EMPTY, KIB, MIB
from meshd.protocol.messages import Probe
from meshd.types import LinkStats, PeerId

log = logging.getLogger("meshd.links")
REPEAT_S = 600.0
ACTIVATION_BYTES = 8 * KIB
RAMP_BYTES = (64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 8 * MIB)
_SAMPLES = 12
_SAMPLING_S = 0.2
"""Time limit of all round-trip samples together, and of all hop samples together. A slow link gets fewer than `_SAMPLES`."""
_SLOW_S = 0.05
"""Probes grow no further after one that took longer than this, because a step may have to wait for a probe."""
_ANSWER_S = 2.0


class LinkProber:
    """Measures each peer's link when it comes up, every ten minutes, and when asked.

    Links are measured one at a time, so that measurements don't disturb each other. `on_change` is called when one has succeeded.
    """

    def __init__(self, links: Links, clock: Clock, on_change: Callable[[], None]) -> None:
        self._links = links
        self._clock = clock
        self._on_change = on_change
        self._stats: dict[PeerId, LinkStats] = {}
        self._filler = memoryview(bytes(RAMP_BYTES[-1]))
        self._turn = asyncio.Lock()
        self._running: dict[PeerId, asyncio.Future[LinkStats | None]] = {}
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Measure all links, at once and repeatedly, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for peer in self._links.peers():
                    self.link_up(peer)
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._tasks.clear()

    def stats(self) -> dict[PeerId, LinkStats]:
        """Returns: the latest measurement of each linked peer."""
        return dict(self._stats)

    def link_up(self, peer: PeerId) -> None:
        """Measure the link with this peer now and every ten minutes."""
        self.link_down(peer)
        if self._group is not None:
            self._tasks[peer] = self._group.create_task(self._repeat(peer))

    def link_down(self, peer: PeerId) -> None:
        """Stop measuring the link with this peer, and forget its measurement."""
        self._stats.pop(peer, None)
        if (task := self._tasks.pop(peer, None)) is not None:
            task.cancel()

    async def probe(self, peer: PeerId) -> LinkStats | None:
        """Measure the link with a peer now, or wait for its running measurement. Returns: None if it fails; the log shows why."""
        if (running := self._running.get(peer)) is not None:
            return await asyncio.shield(running)
        outcome: asyncio.Future[LinkStats | None] = asyncio.get_running_loop().create_future()
        self._running[peer] = outcome
        stats = None
        try:
            async with self._turn:
                stats = self._stats[peer] = await self._measure(peer)
            self._on_change()
        except MeshdError as error:
            log.info("the link with %.8s could not be measured: %s", peer, error)
        finally:
            del self._running[peer]
            outcome.set_result(stats)
        return stats

    async def _repeat(self, peer: PeerId) -> None:
        while True:
            await self.probe(peer)
            await self._clock.sleep(REPEAT_S)

    async def _measure(self, peer: PeerId) -> LinkStats:
        rtt_s = min(await self._samples(peer, EMPTY, echo=False))
        hop_s = statistics.median(await self._samples(peer, self._filler[:ACTIVATION_BYTES], echo=True)) / 2
        return LinkStats(
            rtt_s=rtt_s,
            bandwidth_bytes_s=await self._bandwidth(peer, rtt_s),
            hop_s=hop_s,
            measured_at=self._clock.wall(),
        )

    async def _samples(self, peer: PeerId, payload: memoryview, *, echo: bool) -> list[float]:
        until = self._clock.monotonic() + _SAMPLING_S
        samples = [await self._round_trip(peer, payload, echo=echo)]
        while len(samples) < _SAMPLES and self._clock.monotonic() < until:
            samples.append(await self._round_trip(peer, payload, echo=echo))
        return samples

    async def _bandwidth(self, peer: PeerId, rtt_s: float) -> float:
        """Returns: the highest bandwidth of all probe sizes, in bytes/s. At small sizes the fixed cost of a message dominates."""
        best = 0.0
        for size in RAMP_BYTES:
            elapsed_s = await self._round_trip(peer, self._filler[:size], echo=False)
            best = max(best, size / max(elapsed_s - rtt_s, 1e-6))
            if elapsed_s > _SLOW_S:
                break
        return best

    async def _round_trip(self, peer: PeerId, payload: memoryview, *, echo: bool) -> float:
        began = self._clock.monotonic()
        await self._links.request(peer, lambda number: Probe(request=number, echo=echo), payload, timeout_s=_ANSWER_S)
        return self._clock.monotonic() - began
