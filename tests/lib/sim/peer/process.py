"""One process of a simulated peer: the real agents, composed over the simulated network, clock and compute thread."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.placement.ready.layer_times import LayerTimesFile
from meshd.agents.placement.restart.placements import Placements
from meshd.agents.supervisor import Supervisor
from meshd.peer.compose import compose
from meshd.peer.parts import Parts, PeerSettings, PeerSignals
from meshd.state import MemoryFolder
from meshd.types import Capability, ModelCard, PeerId, Rates
from sim.loop import Owner, SimClock, SimLoop
from sim.network.links import SimLinks, SimProber
from sim.network.network import SimNetwork
from sim.peer.compute import SimCompute
from sim.peer.counting import CountingCoordinator, CountingRouter
from sim.peer.drafts import Drafts
from sim.peer.stand_ins import NoTelemetry, SimLibrary, SimStore, SimWeights
from sim.peer.trust import SimTrustFiles
from sim.toy.backend import Meter, Speed, ToyBackend
from sim.toy.mathematics import MIB, sim_numerics

QUEUE_LIMIT, QUEUE_WAIT_S = 64, 60.0
_DRAIN_S = 8.0


@dataclass(slots=True)
class PeerSpec:
    """The identity and hardware of a peer, which stay the same after a restart."""

    id: PeerId
    name: str
    memory_bytes: int = 1024 * MIB
    speed: Speed = field(default_factory=Speed)
    numerics: int = 0
    outputs_bytes: int = 64 * 1024
    copies: int = 2
    max_sessions: int = 16
    trust: SimTrustFiles = field(kw_only=True)
    drafts: Drafts = field(kw_only=True)


class NoRestarts(Supervisor):
    """Passes an agent's error on: in a simulation it is a fault to be found, not to be survived."""

    async def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        await run()


class SimProcess:
    """One process of a peer, from its start to its end. Must be constructed in its owner's context."""

    def __init__(
        self,
        loop: SimLoop,
        network: SimNetwork,
        rng: random.Random,
        meter: Meter,
        owner: Owner,
        spec: PeerSpec,
        cards: tuple[ModelCard, ...],
    ) -> None:
        self.spec = spec
        self.owner = owner
        self.loop = loop
        self.killed = False
        self.leaving = False
        self.handlers: list[asyncio.Task[None]] = []
        """Handlers of clients' connections."""
        self.idle_tasks: Counter[str] = Counter()
        """The tasks of this process before the first session, counted by the name of the coroutine."""
        self.clock = clock = SimClock(loop, random.Random(rng.random()))
        self.incarnation = int.from_bytes(clock.random_bytes(8), "big") >> 1
        self.compute = SimCompute(loop, random.Random(rng.random()), meter, spec.speed)
        signals = PeerSignals()
        self.links = SimLinks(
            network, owner, spec.id, spec.name, self.incarnation, clock, on_up=signals.link_up, on_down=signals.link_down
        )
        self.trust = spec.trust.load(spec.id, clock)
        self.links.authority = self.trust.key.issuer.public
        self.agents = compose(self._parts(network, rng, meter, cards, signals))
        self.stages = self.agents.stages
        spec.drafts.serve(self.stages)
        self.holdings = self.agents.holdings
        self.drainer = self.agents.drainer
        self.router = cast("CountingRouter", self.agents.router)
        self.coordinator = cast("CountingCoordinator", self.agents.coordinator)
        self.coordinator.methods = Counter()

    def _parts(
        self, network: SimNetwork, rng: random.Random, meter: Meter, cards: tuple[ModelCard, ...], signals: PeerSignals
    ) -> Parts:
        """Return the parts for `compose`: a simulated device, network and files."""
        table = PeerTable()
        links: Any = self.links
        prober: Any = SimProber(self.links, network, self.clock, on_change=signals.changed)
        store: Any = SimStore(cards)
        weights: Any = SimWeights(cards, self.clock, random.Random(rng.random()))
        backend: Any = ToyBackend(meter, self.spec.speed, self.spec.numerics)
        return Parts(
            me=self.spec.id,
            name=self.spec.name,
            version="sim",
            incarnation=self.incarnation,
            settings=PeerSettings(
                copies=self.spec.copies,
                max_sessions=self.spec.max_sessions,
                queue_limit=QUEUE_LIMIT,
                queue_wait_s=QUEUE_WAIT_S,
                outputs_limit_bytes=self.spec.outputs_bytes,
            ),
            signals=signals,
            clock=self.clock,
            telemetry=cast("Any", NoTelemetry()),
            capability=_capability(self.spec),
            measure_free_bytes=lambda: self.spec.memory_bytes,
            backend=backend,
            compute=self.compute,
            links=links,
            prober=prober,
            table=table,
            library=SimLibrary(
                links=links,
                store=store,
                adverts=table.adverts,
                on_change=signals.changed,
                headers=cast("Any", None),  # `SimLibrary` has the text of every model
            ),
            weights=weights,
            devices=DeviceList(links, None),
            placements=Placements(MemoryFolder()),
            layer_times=LayerTimesFile(MemoryFolder()),
            trust=self.trust,
            supervisor=NoRestarts(self.clock),
            router=CountingRouter,
            coordinator=CountingCoordinator,
        )

    async def run(self) -> None:
        """Run the agents until cancelled."""
        self.agents.register()
        await self.agents.library.refresh()
        async with self.agents.running([]):
            await asyncio.Event().wait()

    async def leave(self) -> None:
        """Drain and leave the cluster, as a daemon does on SIGTERM."""
        self.leaving = True
        await self.agents.drain(_DRAIN_S, lambda text: None)
        await self.agents.leave(self._close_connections)

    async def _close_connections(self) -> None:
        """Cancel the handlers of clients' connections, as the HTTP server does."""
        handlers = [handler for handler in self.handlers if not handler.done()]
        for handler in handlers:
            handler.cancel()
        if handlers:
            await asyncio.wait(handlers, timeout=5.0)

    def tasks(self) -> Counter[str]:
        """Count the tasks that are not done, by the name of their coroutine."""
        return Counter(str(getattr(task.get_coro(), "__qualname__", task)) for task in self.owner.tasks.values() if not task.done())


def _capability(spec: PeerSpec) -> Capability:
    return Capability(
        backend="toy",
        numerics=sim_numerics(spec.numerics),
        processor="sim",
        threads=1,
        memory_total_bytes=spec.memory_bytes,
        memory_free_bytes=spec.memory_bytes,
        rates=Rates(
            decode_bytes_s=50 * MIB / spec.speed.token_layer_s,
            prefill_flops_s=25 * MIB / (spec.speed.token_layer_s * spec.speed.prefill_share),
            memory_bytes_s=1e10,
            attention_bytes_s=1e9,
            disk_bytes_s=1e9,
            layer_overhead_s=1e-5,
        ),
    )
