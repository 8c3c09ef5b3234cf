"""Real stage hosts of several peers in one process, linked through memory instead of sockets."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from meshd.agents.device.compute import ComputeThread
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher, to_view
from meshd.agents.observe.spans import Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.observe.work import WorkMeter
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels
from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.host import StageHost
from meshd.clock import SystemClock
from meshd.errors import Overloaded, PeerLost
from meshd.kernels.backend import LoadedLayers
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.share import KvShare
from meshd.protocol.codec import decode, encode
from meshd.protocol.messages import Ack, Closed, Error, Failed, HandedOver, HandOver, Lane, Message, Mirrored, Tokens
from meshd.telemetry import Telemetry
from meshd.types import LayerRange, ModelCard, ModelId, ModelSpec, PeerId, Rates
from opaque.arena import OpaqueArena
from opaque.stage import OpaqueLoaded

MODEL = ModelId("fe" * 16)
POOL_BLOCKS = 24

RATES = Rates(
    decode_bytes_s=1e9, prefill_flops_s=1e10, memory_bytes_s=1e10, attention_bytes_s=1e9, disk_bytes_s=1e9, layer_overhead_s=1e-4
)


class QuickClock(SystemClock):
    """The system clock with short sleeps. A test moves it forward by raising `ahead`."""

    def __init__(self) -> None:
        self.ahead = 0.0
        """Seconds that this clock shows beyond the system clock."""

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.05))


class MemoryLinks:
    """Stands in for `Links`. Messages are encoded and decoded, and arrive in order, one iteration of the event loop later."""

    def __init__(self, id_: PeerId, mesh: "StageMesh") -> None:
        self.id = id_
        self.mesh = mesh
        self.sent: list[tuple[PeerId, Message]] = []
        self.waiting: list[Callable[[], None]] = []
        """Callbacks of senders that wait for room on the bulk lane."""
        self.dispatcher = Dispatcher(self.send, LinkLog(mesh.clock))
        self.register = self.dispatcher.register
        self.next_request = self.dispatcher.next_request

    def send(self, peer: PeerId, message: Message, payload: Any = None) -> None:
        if not self.mesh.linked(self.id, peer):
            raise PeerLost(f"{peer:.8} is not linked with this peer")
        if message.send_lane is Lane.BULK and (self.id, peer) in self.mesh.full:
            raise Overloaded("the lane is full")
        self.sent.append((peer, message))
        decoded, view = decode(encode(message)), memoryview(bytes(to_view(payload)))
        asyncio.get_running_loop().call_soon(self._arrive, peer, decoded, view)

    def when_room(self, peer: PeerId, lane: Lane, callback: Callable[[], None]) -> None:
        self.waiting.append(callback)

    def idle_s(self, peer: PeerId, lane: Lane) -> float:
        return float("inf") if peer == self.id else 0.0

    def _arrive(self, peer: PeerId, message: Message, payload: memoryview) -> None:
        if self.mesh.linked(self.id, peer):
            self.mesh.peers[peer].links.dispatcher.deliver(self.id, message, payload)

    async def request(self, peer: PeerId, message: Any, payload: Any = None, *, timeout_s: float) -> Any:
        return await self.dispatcher.request(peer, message, payload, timeout_s)


@dataclass
class StagePeer:
    """A stage host with one contiguous range of layers in memory, and the messages that its peer received as a coordinator."""

    links: MemoryLinks
    residents: ResidentModels
    compute: ComputeThread
    host: StageHost
    inbox: list[Message] = field(default_factory=list)
    listeners: list[Callable[[PeerId, Message], None]] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.links.id

    @property
    def resident(self) -> ResidentLayers:
        return self.residents.entries[0]

    @property
    def share(self) -> KvShare:
        assert self.resident.kv is not None
        return self.resident.kv

    @property
    def blocks_used(self) -> int:
        """KV in use, in blocks of 32 tokens of all layers of the share."""
        return -(-self.share.leased_bytes * self.share.tokens // (32 * self.share.bytes))

    def on_message(self, sender: PeerId, message: Message, payload: memoryview) -> None:
        if isinstance(message, Tokens):
            self.host.on_tokens(sender, message, payload)
        if isinstance(message, Ack):
            self.host.on_ack(sender, message)
        if isinstance(message, Error) and message.session is not None:
            self.host.on_error(sender, message)
        self.inbox.append(message)
        for listener in self.listeners:
            listener(sender, message)

    def on_hand_over(self, sender: PeerId, message: HandOver, payload: memoryview) -> HandedOver:
        return HandedOver(request=message.request, known=self.host.on_hand_over(sender, message))

    def received(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.inbox if isinstance(message, kind)]


class StageMesh:
    """Peers `a`, `b`, ... on one event loop. Use as an async context manager; leaving it stops them."""

    def __init__(self, spec: ModelSpec, weights: LoadedLayers) -> None:
        self.spec = spec
        self.weights = weights
        self.clock = QuickClock()
        self.peers: dict[PeerId, StagePeer] = {}
        self.down: set[frozenset[PeerId]] = set()
        """Pairs of peers whose link is down."""
        self.idle: set[PeerId] = set()
        """Peers that coordinate no session, though one was given to them."""
        self.full: set[tuple[PeerId, PeerId]] = set()
        """(sender, receiver) of each bulk lane that is full."""
        self._tasks = asyncio.TaskGroup()
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        for peer in self.peers.values():
            peer.host.close()
        for task in self._running:
            task.cancel()
        for peer in self.peers.values():
            if isinstance(peer.links, MemoryLinks):
                peer.links.dispatcher.cancel_tasks()
        await self._tasks.__aexit__(*error)
        for peer in self.peers.values():
            peer.compute.close()

    def linked(self, one: PeerId, other: PeerId) -> bool:
        return one == other or frozenset((one, other)) not in self.down

    def start(
        self,
        name: str,
        layers: str = "0-4",
        *,
        blocks: int = POOL_BLOCKS,
        outputs: int = 1 << 20,
        spare: int = 1 << 20,
        links: Any = None,
    ) -> StagePeer:
        """Start a peer that has `layers` in memory, `blocks` KV blocks, `outputs` bytes for kept outputs, and `spare` bytes.

        links: real ones, which run already. None: links through memory.
        """
        if links is None:
            links = MemoryLinks(PeerId(name * 52), self)
            links.dispatcher.group = self._tasks
        parsed, compute = LayerRange.parse(layers), ComputeThread()
        arena = OpaqueArena(1 << 30) if isinstance(self.weights, OpaqueLoaded) else HostArena(1 << 30)
        share = KvShare(arena, MODEL, self.spec, parsed, blocks * 32)
        resident = ResidentLayers(card_of(self.spec), parsed, blocks * 32, 0, LoadState.ACTIVE, 1.0, weights=self.weights, kv=share)
        residents = ResidentModels(arena, [resident])
        host = StageHost(
            me=links.id,
            links=links,
            residents=residents,
            shared_stages=SharedStages(residents, lambda: spare - resident.stages.border_bytes, lambda: None),
            learning=StepLearning(links.id, RATES, self.clock),
            compute=compute,
            clock=self.clock,
            telemetry=Telemetry(),
            story=Story(self.clock),
            spans=Spans(),
            work=WorkMeter(EventStream(links.id, name, self.clock), self.clock),
            spec_of=lambda model: self.spec if model == MODEL else None,
            spare_bytes=lambda: spare,
            outputs_limit_bytes=outputs,
            may_coordinate=lambda peer, session: self.linked(links.id, peer) and not (peer == links.id and peer in self.idle),
            on_change=lambda: None,
        )
        peer = StagePeer(links, residents, compute, host)
        host.register()
        for kind in (Tokens, Ack, Failed, Mirrored, Closed, Error):
            links.register(kind, peer.on_message)
        links.register(HandOver, peer.on_hand_over)
        self.peers[links.id] = peer
        self._running.append(self._tasks.create_task(host.run()))
        return peer

    def cut(self, one: StagePeer, other: StagePeer) -> None:
        """Take the link between two peers down."""
        self.down.add(frozenset((one.id, other.id)))
        for peer, lost in ((one, other), (other, one)):
            peer.links.dispatcher.peer_lost(lost.id, "cut")
            peer.host.on_peer_gone(lost.id, "cut")

    def make_room(self, one: StagePeer, other: StagePeer) -> None:
        """End the state `full` of the bulk lane from one peer to the other, and call the senders that wait."""
        self.full.discard((one.id, other.id))
        waiting, one.links.waiting = one.links.waiting, []
        for callback in waiting:
            asyncio.get_running_loop().call_soon(callback)

    def isolate(self, lost: StagePeer) -> None:
        """Take all links of a peer down."""
        for peer in self.peers.values():
            if peer is not lost:
                self.cut(peer, lost)


def card_of(spec: ModelSpec) -> ModelCard:
    return ModelCard(
        id=MODEL,
        name="tiny",
        ref="test",
        quantisation="Q4_1",
        spec=spec,
        layer_bytes=(1,) * spec.layers,
        embedding_bytes=1,
        head_bytes=1,
        layer_parameters=(1,) * spec.layers,
        head_parameters=1,
        end_of_sequence=(),
    )
