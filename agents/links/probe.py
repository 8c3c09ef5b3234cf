"""Measures the links of this peer, always: a change of a link shows in plans within 5 s.

The round trip comes from heartbeats. The bandwidth comes from large messages that the other peer has received (it reports them in
its answers to heartbeats) and, on a link that carried none lately, from probes: every 2 s one that occupies the link for about
20 ms, so 1 % of the link. A link that has carried no session for a while is probed less often. A surprising result is confirmed at
once by a series of growing probes, as is a new link's first measurement.
"""

import asyncio
import logging
from collections.abc import Callable

from meshd.agents.links.estimate import LinkEstimate, bandwidth_of, changed, shortest_s
from meshd.agents.links.links import Links
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.framing import EMPTY, KIB, MIB
from meshd.protocol.messages import Probe
from meshd.types import LinkStats, PeerId

log = logging.getLogger("meshd.links")
PROBE_S = 2.0
UNUSED_PROBE_S = 30.0
UNUSED_S = 300.0
"""A link without a session's message for this long is probed every `UNUSED_PROBE_S`."""
TURN_S = 0.1
"""With many links, each of them is probed less often: a probe for each `TURN_S`."""
RAMP_BYTES = (64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
_FIRST_ROUND_TRIPS = 5
_SLOW_S = 0.02
"""Probes grow no further after one whose transfer took longer than this, because a step may have to wait for a probe."""
_ANSWER_S = 2.0
_WATCH_S = 0.25


class LinkProber:
    """Measures each link from the moment when it comes up. `on_change` is called when the advert should be sent again.

    Links are probed one at a time, so that probes don't disturb each other.
    """

    def __init__(
        self,
        links: Links,
        clock: Clock,
        on_change: Callable[[], None],
        on_round_trip: Callable[[PeerId, float], None] = lambda peer, seconds: None,
    ) -> None:
        self._links = links
        self._clock = clock
        self._on_change = on_change
        self._on_round_trip = on_round_trip
        self._announced: dict[PeerId, LinkStats] = {}
        self._counted: dict[PeerId, int] = {}
        self._filler = memoryview(bytes(RAMP_BYTES[-1]))
        self._turn = asyncio.Lock()
        self._running: dict[PeerId, asyncio.Future[LinkStats | None]] = {}
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Measure all links until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for peer in self._links.peers():
                    self.link_up(peer)
                await self._watch()
        finally:
            self._group = None
            self._tasks.clear()

    def stats(self) -> dict[PeerId, LinkStats]:
        """Returns: the present values of each link that is measured."""
        found = {peer: self._stats(peer) for peer in self._links.peers()}
        return {peer: stats for peer, stats in found.items() if stats is not None}

    def link_up(self, peer: PeerId) -> None:
        """Begin to measure the link with this peer."""
        self.link_down(peer)
        if self._group is not None:
            self._tasks[peer] = self._group.create_task(self._repeat(peer))

    def link_down(self, peer: PeerId) -> None:
        """Stop measuring the link with this peer."""
        self._announced.pop(peer, None)
        self._counted.pop(peer, None)
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
                await self._measure(peer)
            stats = self._stats(peer)
            self._announce(peer)
        except MeshdError as error:
            log.info("the link with %.8s could not be measured: %s", peer, error)
        finally:
            del self._running[peer]
            outcome.set_result(stats)
        return stats

    def _stats(self, peer: PeerId) -> LinkStats | None:
        estimate = self._links.estimate(peer)
        return estimate.stats(self._clock.monotonic(), self._clock.wall()) if estimate is not None else None

    async def _watch(self) -> None:
        """Announce changes of round trips and of bandwidths that real traffic shows."""
        while True:
            await self._clock.sleep(_WATCH_S)
            for peer in self._links.peers():
                estimate = self._links.estimate(peer)
                if estimate is not None and estimate.round_trips != self._counted.get(peer):
                    self._counted[peer] = estimate.round_trips
                    self._on_round_trip(peer, estimate.latest_rtt_s)
                self._announce(peer)

    def _announce(self, peer: PeerId) -> None:
        stats = self._stats(peer)
        if stats is not None and changed(self._announced.get(peer), stats):
            self._announced[peer] = stats
            self._on_change()

    async def _repeat(self, peer: PeerId) -> None:
        await self.probe(peer)
        while True:
            await self._clock.sleep(self._interval_s(peer))
            estimate = self._links.estimate(peer)
            if estimate is None or self._clock.monotonic() < estimate.disturbed_until:
                continue  # the link is gone, or real traffic measures it
            try:
                async with self._turn:
                    await self._check(peer, estimate)
            except MeshdError as error:
                log.debug("the link with %.8s could not be probed: %s", peer, error)
            self._announce(peer)

    def _interval_s(self, peer: PeerId) -> float:
        unused = self._links.unused_s(peer) > UNUSED_S
        return max(UNUSED_PROBE_S if unused else PROBE_S, TURN_S * len(self._links.peers()))

    async def _check(self, peer: PeerId, estimate: LinkEstimate) -> None:
        """Probe a link once, and again with growing sizes if the result is surprising."""
        size = estimate.probe_bytes(self._clock.monotonic())
        elapsed_s = await self._round_trip(peer, self._filler[:size])
        if estimate.probed(size, elapsed_s, self._clock.monotonic()):
            await self._ramp(peer, estimate)

    async def _measure(self, peer: PeerId) -> None:
        """Measure a link from nothing. Raises: PeerLost, Overloaded."""
        estimate = self._links.estimate(peer)
        for _ in range(_FIRST_ROUND_TRIPS):
            trip_s = await self._round_trip(peer, EMPTY)
            if estimate is not None:
                estimate.round_trip(trip_s, self._clock.monotonic())
        if estimate is not None:
            await self._ramp(peer, estimate)

    async def _ramp(self, peer: PeerId, estimate: LinkEstimate) -> None:
        """Send growing probes, and add the highest bandwidth. At small sizes slow start or the cost of a message dominates."""
        best = 0.0
        for size in RAMP_BYTES:
            elapsed_s = await self._round_trip(peer, self._filler[:size])
            rtt_s = estimate.rtt_s(self._clock.monotonic()) or 0.0
            sent_s = max(elapsed_s - rtt_s, shortest_s(elapsed_s))
            # Later probes find TCP's window open already: for them, this is a lower bound.
            best = max(best, size / sent_s if best else bandwidth_of(size, elapsed_s, rtt_s, slow_start=estimate.slow_start))
            if sent_s > _SLOW_S:
                break
        estimate.bandwidth(best, self._clock.monotonic())

    async def _round_trip(self, peer: PeerId, payload: memoryview) -> float:
        began = self._clock.monotonic()
        await self._links.request(peer, lambda number: Probe(request=number), payload, timeout_s=_ANSWER_S)
        return self._clock.monotonic() - began
