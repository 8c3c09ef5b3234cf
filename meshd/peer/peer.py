"""All agents of one peer: their handlers of messages, their tasks, and how they end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.admin.event_relay import EventRelay
from meshd.agents.admin.listings import Listings
from meshd.agents.admin.reach import ReachChecker
from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.admin.trace_collector import TraceCollector
from meshd.agents.device.compute import ComputeQueue
from meshd.agents.device.sensors import DeviceSensors
from meshd.agents.links.link_table import STOPS
from meshd.agents.links.links import Links
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.membership import Membership
from meshd.agents.membership.sources import Source
from meshd.agents.observe.rows import RowFeed
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.observe.work import WorkMeter
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.keeper import Keeper
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.preload import Preload
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.placement.restart.restore import Restorer
from meshd.agents.placement.weights.serve import WeightServer
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.session.plan.drain import Drainer
from meshd.agents.session.plan.route import Router
from meshd.agents.stage.host import StageHost
from meshd.agents.supervisor import Supervisor
from meshd.agents.trust.exchange import TrustExchange
from meshd.protocol.messages import Ack, Error, HandedOver, HandOver, Tokens
from meshd.types import PeerId

log = getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """All agents of one peer."""

    events: EventStream
    story: Story
    holdings: ResidentModels
    compute: ComputeQueue
    links: Links
    prober: LinkProber
    library: ModelLibrary
    stages: StageHost
    drainer: Drainer
    membership: Membership
    devices: DeviceList
    loader: Loader
    weight_server: WeightServer
    placer: PlacementClient
    router: Router
    preload: Preload
    restorer: Restorer
    journal: JournalWriters
    deputy: Deputy
    locator: Locator
    coordinator: Coordinator
    keeper: Keeper
    story_collector: StoryCollector
    trace_collector: TraceCollector
    listings: Listings
    rows: RowFeed
    relay: EventRelay
    reach: ReachChecker
    exchange: TrustExchange
    work: WorkMeter
    sensors: DeviceSensors | None
    supervisor: Supervisor

    def register(self) -> None:
        """Register the agents' handlers of messages from other peers."""
        for agent in (
            self.library,
            self.weight_server,
            self.stages,
            self.loader,
            self.membership,
            self.devices,
            self.coordinator,
            self.deputy,
            self.drainer,
            self.story_collector,
            self.trace_collector,
            self.relay,
            self.reach,
            self.exchange,
        ):
            agent.register()
        self.locator.register(self.coordinator)
        self.links.register(Tokens, self._on_tokens)
        self.links.register(Ack, self._on_ack)
        self.links.register(HandOver, self._on_hand_over)
        self.links.register(Error, self._on_error)

    @asynccontextmanager
    async def running(self, sources: Iterable[Source]) -> AsyncIterator[None]:
        """Run all agents inside the block, restarting those that fail. On exit they are cancelled and their memory is freed."""
        supervise = self.supervisor.supervise
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self.links.run(supervise)),
                    tasks.create_task(supervise("models on disk", self.library.run)),
                    tasks.create_task(self.membership.run(sources, supervise)),
                    tasks.create_task(supervise("keys of MQTT devices", self.devices.run)),
                    tasks.create_task(supervise("link measurements", self.prober.run)),
                    tasks.create_task(supervise("stages", self.stages.run)),
                    tasks.create_task(supervise("coordinator", self.coordinator.run)),
                    tasks.create_task(supervise("journal", self.journal.run)),
                    tasks.create_task(supervise("deputy", self.deputy.run)),
                    tasks.create_task(supervise("models to place", self.preload.run)),
                    tasks.create_task(supervise("layers of before", self.restorer.run)),
                    tasks.create_task(supervise("placement keeper", self.keeper.run)),
                    tasks.create_task(supervise("rows for readers of events", self.rows.run)),
                    tasks.create_task(supervise("events of other peers", self.relay.run)),
                    tasks.create_task(supervise("rotations", self.exchange.run)),
                    tasks.create_task(supervise("known peers", self.exchange.trust.known.run)),
                    tasks.create_task(supervise("work of the stages", self.work.run)),
                ]
                if self.sensors is not None:
                    running.append(tasks.create_task(supervise("sensors of the device", self.sensors.run)))
                try:
                    yield
                finally:
                    for task in running:
                        task.cancel()
        finally:
            self.stages.close()
            await self.coordinator.close()
            await self.library.close()
            await self.loader.close()
            await self.weight_server.close()
            self.compute.close()

    async def leave(self, close_clients: Callable[[], Awaitable[None]]) -> None:
        """Hand over sessions, close the clients' connections, then close the links.

        The clients' connections are closed first, because a coordinator without links would send clients an error about lost peers.
        """
        self.journal.flush()
        self.coordinator.leave()
        await close_clients()
        await self.router.close()
        await self.links.close(STOPS)

    async def drain(self, timeout_s: float, on_waiting: Callable[[str], None]) -> None:
        """Refuse new work, and wait at most `timeout_s` until all sessions of this peer have ended or moved to other peers.

        `on_waiting` is called with a description of what this peer waits for.
        """
        await self.drainer.leave(timeout_s, on_waiting, answers=lambda: len(self.coordinator.answers))

    def _on_tokens(self, sender: PeerId, message: Tokens, payload: memoryview) -> None:
        # The next batch is chosen after all tokens of this one have come to their first stages, and before they are sent to the
        # clients: the compute thread waits for it.
        if self.stages.on_tokens(sender, message, payload):
            asyncio.get_running_loop().call_soon(self.coordinator.on_tokens, sender, message, payload)
        else:
            self.coordinator.on_tokens(sender, message, payload)

    def _on_ack(self, sender: PeerId, message: Ack, payload: memoryview) -> None:
        if message.stage:
            self.stages.on_ack(sender, message)
        else:
            self.coordinator.on_ack(sender, message)

    def _on_hand_over(self, sender: PeerId, message: HandOver, payload: memoryview) -> HandedOver:
        has_kv, has_record = self.stages.on_hand_over(sender, message), self.deputy.on_hand_over(sender, message)
        return HandedOver(request=message.request, known=has_kv or has_record)

    def _on_error(self, sender: PeerId, message: Error, payload: memoryview) -> None:
        if message.request:
            return  # the reply to a request that already timed out or was cancelled
        log.warning("%s (%.8s) reports: %s (%s)", self.membership.name_of(sender), sender, message.message, message.code)
        if message.session is not None:
            self.stages.on_error(sender, message)
            self.coordinator.on_error(sender, message)
