"""Run the simulator for weeks of virtual time, and check that what each peer keeps does not grow.

    python -P tests/sim/days.py --days 24 [--peers 4] [--seed 1]

A cluster of some steady peers lives through bursts of use, one in two hours: requests, models that are placed and unplaced, peers
that are killed or stopped and come back, and guests, devices with a new identity that come once. Between the bursts nothing
happens, and the peers' periodic work runs less often, so that weeks take minutes. One peer is never restarted.

After each burst the members of all tables of every process are counted. Nothing may grow: of each table and of all together, the
peak of the last quarter of the time may be above that of the second quarter by chance only. The records that are kept up to a limit
get a low one here, so that they are full after the first bursts, or are full from the beginning. Exit status: 0 if nothing grows.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from ids import peer_id
from meshd.agents.membership.adverts import publisher
from meshd.agents.observe import spans, story, stream
from meshd.agents.placement import keeper
from meshd.agents.service import MeshOptions
from meshd.agents.trust.known_peers import MAX_KNOWN, NAME, KnownPeers
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.state import MemoryFolder
from sim.clients.client import Client
from sim.clients.requests import Workload, make_request
from sim.kept import kept
from sim.loop import SimClock
from sim.options import Options
from sim.patches import patched
from sim.world import World

DAY_S = 86400.0
BURST_EVERY_S = 7200.0
BURST_S = 20.0
SETTLE_S = 70.0
"""Longer than the longest sleep of quiet time, so that all periodic work runs at its own pace again when a burst begins."""
STRETCH, LONGEST_S = 300.0, 60.0
REQUESTS = 6
GROWTH, BY_CHANCE = 1.05, 40
"""A peak may be higher by 5 % and 40 objects: a burst has 0 to 9 sessions at a time, each with some dozens of objects."""


class Days:
    """One run, and the counts of what the steady peers keep."""

    def __init__(self, seed: int, peers: int, days: float) -> None:
        self.world = World(seed, Options(peers=peers, models=2, answer=40))
        self.bursts = max(4, int(days * DAY_S / BURST_EVERY_S))
        self.counts: defaultdict[str, list[Counter[str]]] = defaultdict(list)
        """For each peer, what it kept after each burst."""
        self.tasks: list[int] = []
        self.answered = 0
        self.guests = 0
        self._rng = self.world.rng_faults
        for peer in self.world.peers.values():
            _fill_register(peer.spec.trust.known, SimClock(self.world.loop, self._rng))

    def run(self) -> None:
        """Run all bursts. Raises: what a broken invariant raises."""
        world = self.world
        with patched(world), low_limits():
            try:
                world.loop.run_until_complete(self._main())
            finally:
                self._close()

    async def _main(self) -> None:
        world = self.world
        for peer in world.peers.values():
            peer.start()
        await asyncio.sleep(3.0)
        for number in range(self.bursts):
            await self._burst(number)
            await self._idle()
            self._count()
            await self._quiet()
            if sys.stdout.isatty():
                print(f"\r{number + 1} of {self.bursts} bursts", end="", flush=True)

    async def _burst(self, number: int) -> None:
        world = self.world
        workload = Workload(requests=REQUESTS, within_s=BURST_S, prompt=60, answer=40)
        clients = [
            Client(world, make_request(world.rng_clients, world.cards, workload, number, world.rng_clients.uniform(0, BURST_S)))
            for _ in range(REQUESTS)
        ]
        work = [self._churn(), self._guest(), self._place(), *(client.run() for client in clients)]
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
        self.answered += sum(client.ended == "exact" for client in clients)

    async def _churn(self) -> None:
        """Kill or stop one of the steady peers, but the first, and start it again."""
        world, rng = self.world, self._rng
        victim = rng.choice(list(world.peers.values())[1:])
        await asyncio.sleep(rng.uniform(0, BURST_S / 2))
        world.health.begin(victim, "restart")
        if rng.random() < 0.5:
            world.kill(victim)
        else:
            await world.stop(victim)
        await asyncio.sleep(rng.uniform(0.5, 8.0))
        world.start(victim)
        world.health.end(victim, "restart")

    async def _guest(self) -> None:
        """Let a device with a new identity come, and leave for good."""
        world, rng = self.world, self._rng
        self.guests += 1
        await asyncio.sleep(rng.uniform(0, BURST_S / 2))
        world._add_peer(1000 + self.guests)
        guest = list(world.peers.values())[-1]
        world.health.begin(guest, "restart")
        guest.start()
        await asyncio.sleep(rng.uniform(2.0, 8.0))
        await world.stop(guest)
        world.health.end(guest, "restart")
        del world.peers[guest.id]

    async def _place(self) -> None:
        """Place one of the models, and sometimes unplace it before."""
        world, rng = self.world, self._rng
        process = next(iter(world.peers.values())).process
        assert process is not None
        card = rng.choice(world.cards)

        async def act() -> None:
            try:
                if rng.random() < 0.3:
                    await process.agents.placer.unplace(card.id)
                async for _ in process.agents.placer.place(card, MeshOptions(min_peers=rng.choice([1, 2]))):
                    pass
            except MeshdError:
                return  # a peer is lost in the middle of it

        await world.do(process, act(), 30.0)

    async def _idle(self) -> None:
        """Wait until no session runs."""
        for _ in range(600):
            await asyncio.sleep(0.5)
            if not any(self.world.is_busy(peer) for peer in self.world.peers.values()):
                break
        else:
            raise AssertionError("sessions have not ended five minutes after their burst")

    async def _quiet(self) -> None:
        """Let the hours until the next burst pass."""
        loop = self.world.loop
        until = 1000.0 + BURST_EVERY_S * (int((loop.time() - 1000.0) / BURST_EVERY_S) + 1)
        usual = publisher._REPEAT_S, keeper._CHECK_S
        loop.stretch, loop.longest_s = STRETCH, LONGEST_S
        publisher._REPEAT_S = keeper._CHECK_S = LONGEST_S
        await asyncio.sleep(max(0.0, until - SETTLE_S - loop.time()))
        loop.stretch = 1.0
        publisher._REPEAT_S, keeper._CHECK_S = usual
        await asyncio.sleep(SETTLE_S)

    def _count(self) -> None:
        for peer in self.world.peers.values():
            process = peer.process
            assert process is not None
            self.counts[peer.name].append(kept(process.agents))
        self.tasks.append(len(asyncio.all_tasks(self.world.loop)))

    def growing(self) -> list[str]:
        """Return a line for each table that grows, and for all tables of a peer together."""
        lines = []
        for name, counts in self.counts.items():
            totals = [Counter({"all": count.total()}) for count in counts]
            for place in sorted({place for count in counts for place in count}):
                lines += _growth(name, place, [count[place] for count in counts])
            lines += _growth(name, "all tables", [total["all"] for total in totals])
        return lines + _growth("all peers", "tasks", self.tasks)

    def summary(self) -> str:
        first = next(iter(self.world.peers.values())).name
        totals = [count.total() for count in self.counts[first]]
        quarters = [max(totals[len(totals) * part // 4 : len(totals) * (part + 1) // 4]) for part in range(4)]
        days = (self.world.loop.time() - 1000.0) / DAY_S
        return (
            f"{days:.1f} days, {self.bursts} bursts, {self.answered} exact answers, {self.guests} guests; "
            f"peaks of objects kept by {first}, never restarted, in each quarter: {quarters}"
        )

    def _close(self) -> None:
        for peer in self.world.peers.values():
            peer.kill(silently=True)
        loop = self.world.loop
        for _ in range(20):
            tasks = asyncio.all_tasks(loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=60.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@contextmanager
def low_limits() -> Iterator[None]:
    """Inside the block, have the records of what happened keep little."""
    limits = (
        (stream, "KEPT_EVENTS", 50),
        (story, "_SESSIONS", 8),
        (story, "_LINES", 8),
        (spans, "MAX_SESSIONS", 8),
        (spans, "MAX_SPANS", 8),
    )
    usual = [getattr(module, name) for module, name, _ in limits]
    for module, name, limit in limits:
        setattr(module, name, limit)
    try:
        yield
    finally:
        for (module, name, _), limit in zip(limits, usual, strict=True):
            setattr(module, name, limit)


def _fill_register(folder: MemoryFolder, clock: Clock) -> None:
    """Fill the register of peers that were ever linked with some that are gone, which make room for guests."""
    known = KnownPeers(folder, clock)
    for number in range(MAX_KNOWN):
        known.linked(peer_id(f"past {number}"), "past", "10.0.0.1", "0" * 64)
    folder.write(NAME, known._encoded())


def _growth(peer: str, place: str, sizes: list[int]) -> list[str]:
    quarter = len(sizes) // 4
    before, after = max(sizes[quarter : 2 * quarter]), max(sizes[3 * quarter :])
    if after <= GROWTH * before + BY_CHANCE:
        return []
    return [f"{peer}: {place} grows: at most {before} in the second quarter of the time, {after} in the last"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=24.0)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.perf_counter()
    days = Days(given.seed, given.peers, given.days)
    days.run()
    growing = days.growing()
    print("\r" + days.summary(), *growing, sep="\n")
    print(f"{time.perf_counter() - began:.0f} s, {len(growing)} tables grow")
    return bool(growing)


if __name__ == "__main__":
    sys.exit(main())
