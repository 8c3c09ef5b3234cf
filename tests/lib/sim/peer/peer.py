"""A simulated device, whose process can be killed, restarted, frozen and slowed."""

import asyncio
import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from meshd.types import ModelCard, PeerId
from sim.loop import Owner, SimLoop
from sim.network.network import SimNetwork
from sim.peer.process import PeerSpec, SimProcess
from sim.toy.backend import Meter

if TYPE_CHECKING:
    from sim.checks import Checks


class SimPeer:
    """One peer, with one process after another."""

    def __init__(
        self,
        loop: SimLoop,
        network: SimNetwork,
        rng: random.Random,
        meter: Meter,
        spec: PeerSpec,
        cards: tuple[ModelCard, ...],
        checks: "Checks",
    ) -> None:
        self.spec = spec
        self.process: SimProcess | None = None
        """The running process. None: the peer is down."""
        self.frozen = False
        self._loop = loop
        self._network = network
        self._rng = rng
        self._meter = meter
        self._cards = cards
        self._checks = checks
        self._past_counts = Counter[str]()
        """Counts of this peer's processes that have ended, added up."""
        self._past_searching_s = 0.0

    @property
    def id(self) -> PeerId:
        return self.spec.id

    @property
    def name(self) -> str:
        return self.spec.name

    def counts(self) -> Counter[str]:
        """Return counts over all processes of this peer: steps, plans, searches, recoveries (in all and by method)."""
        return self._past_counts + (_counts(self.process) if self.process is not None else Counter())

    @property
    def searching_s(self) -> float:
        """Real time in seconds that the routers of all processes of this peer have searched."""
        return self._past_searching_s + (self.process.router.searching_s if self.process is not None else 0.0)

    def start(self) -> None:
        """Start a new process, with nothing in memory."""
        assert self.process is None
        owner = Owner(self.spec.name)
        context = owner.context()
        self.process = process = context.run(
            SimProcess, self._loop, self._network, random.Random(self._rng.random()), self._meter, owner, self.spec, self._cards
        )
        owner.after = partial(self._checks.after, process)
        self._loop.create_task(process.run(), context=context)  # the task's owner keeps a reference to it

    def kill(self, *, silently: bool = False) -> None:
        """End the process as SIGKILL does, or with `silently` as a power cut does: the other peers get no notice."""
        process, self.process = self.process, None
        if process is None:
            return
        self._past_counts += _counts(process)
        self._past_searching_s += process.router.searching_s
        process.owner.stopped = True
        self._network.detach(process.links, "connection closed", silently=silently)
        self._cancel_tasks(process)
        self.frozen = False

    async def stop(self) -> None:
        """Leave the cluster and end the process, as a daemon does on SIGTERM."""
        process = self.process
        if process is None:
            return
        leaving = self._loop.create_task(process.leave(), context=process.owner.context())
        await asyncio.wait([leaving], timeout=30.0)
        if self.process is process:
            self.kill()

    def set_slow(self, slow: float) -> None:
        """Make the peer compute `slow` times slower than normal."""
        self.spec.speed.slow = slow
        if self.process is not None:
            self.process.compute.speed_changed()

    def freeze(self) -> None:
        """Freeze the process, as SIGSTOP does."""
        if self.process is not None and not self.frozen:
            self.frozen = self.process.owner.stopped = True
            self._network.freeze(self.id)

    def thaw(self) -> None:
        """Let a frozen process continue, as SIGCONT does."""
        if self.process is not None and self.frozen:
            self.frozen = False
            self._loop.resume(self.process.owner)
            self._network.thaw(self.id)

    def _cancel_tasks(self, process: SimProcess) -> None:
        """Cancel all tasks of a killed process. Their clean-up has no effect outside: no links are left, and errors are ignored."""
        process.killed = process.owner.killed = True
        process.owner.after = None
        self._loop.resume(process.owner)
        for task in list(process.owner.tasks.values()):
            task.cancel()


def _counts(process: SimProcess) -> Counter[str]:
    router = process.router
    counts = Counter(steps=process.compute.jobs, plans=router.plans, recoveries=router.recoveries, searches=router.searches)
    return process.coordinator.methods + counts + process.compute.kinds
