"""What a link can do, measured by the peer that sends: round trip, the time of one activation's hop, bytes per second.

Three rounds of PROBE, within a second and 32 MiB together: empty ones give the round trip, echoed ones of an activation's size the
hop, and growing ones the bandwidth. The ramp stops at the first size that takes longer than a step may be delayed.
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
"""For the round trips, and again for the hops; on a slow link fewer samples fit."""
_SLOW_S = 0.05
_ANSWER_S = 2.0


class LinkProber:
    """Measures each peer's link when it comes up, every ten minutes, and when asked.

    One at a time, so that none disturbs another. `on_change` is called after every new measurement.
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
        """Run the probes of all links until cancelled."""
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
        """The latest measurement of each peer that is linked."""
        return dict(self._stats)

    def link_up(self, peer: PeerId) -> None:
        """Measure this peer's link now and then every ten minutes."""
        self.link_down(peer)
        if self._group is not None:
            self._tasks[peer] = self._group.create_task(self._repeat(peer))

    def link_down(self, peer: PeerId) -> None:
        """Stop measuring it and forget what was measured."""
        self._stats.pop(peer, None)
        if (task := self._tasks.pop(peer, None)) is not None:
            task.cancel()

    async def probe(self, peer: PeerId) -> LinkStats | None:
        """Measure now, or join a measurement of this peer that is under way. Returns: None if it failed; the log says why."""
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
        """The best of the sizes: the small ones are dominated by what each message costs."""
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
