"""Stage hosts that talk through memory instead of sockets, and a coordinator for one session of theirs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import numpy as np

from meshd.agents.device.compute import ComputeThread
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher, to_view
from meshd.agents.observe.story import Story
from meshd.agents.placement.loads import LoadState, ResidentLayers, ResidentModels
from meshd.agents.session.plan.resume import ResumePoint, StageHeld, resume_positions
from meshd.agents.stage.host import StageHost
from meshd.clock import SystemClock
from meshd.errors import PeerLost
from meshd.kernels.backend import LoadedLayers
from meshd.kernels.kv import KVPool
from meshd.kernels.sampler import needs_past_tokens
from meshd.protocol.codec import decode, encode
from meshd.protocol.messages import (
    Close,
    Closed,
    Credit,
    Error,
    Failed,
    Message,
    Mirror,
    Mirrored,
    Open,
    Opened,
    Prompt,
    Renew,
    Resume,
    Token,
)
from meshd.telemetry import Telemetry
from meshd.types import LayerRange, ModelCard, ModelId, ModelSpec, PeerId, Plan, PlanId, SamplingParams, SessionId, StagePlan

MODEL = ModelId("m" * 32)
SESSION = SessionId("5" * 32)
ROOM_BLOCKS = 24
WAIT_S = 10.0


class QuickClock(SystemClock):
    """Short sleeps, and a leap ahead when a test wants one."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.05))


class MemoryLinks:
    """What `Links` is to its users. Messages are encoded and decoded, and come in order, one turn of the loop later."""

    def __init__(self, id_: PeerId, mesh: "StageMesh") -> None:
        self.id = id_
        self.mesh = mesh
        self.sent: list[tuple[PeerId, Message]] = []
        self.dispatcher = Dispatcher(self.send, LinkLog(mesh.clock))
        self.register = self.dispatcher.register
        self.next_request = self.dispatcher.next_request

    def send(self, peer: PeerId, message: Message, payload: Any = None) -> None:
        if not self.mesh.linked(self.id, peer):
            raise PeerLost(f"{peer:.8} is not linked with this peer")
        self.sent.append((peer, message))
        read, view = decode(encode(message)), memoryview(bytes(to_view(payload)))
        asyncio.get_running_loop().call_soon(self._arrive, peer, read, view)

    def _arrive(self, peer: PeerId, message: Message, payload: memoryview) -> None:
        if self.mesh.linked(self.id, peer):
            self.mesh.peers[peer].links.dispatcher.deliver(self.id, message, payload)

    async def request(self, peer: PeerId, message: Any, payload: Any = None, *, timeout_s: float) -> Any:
        return await self.dispatcher.request(peer, message, payload, timeout_s)


@dataclass
class StagePeer:
    """A stage host with one load, and what a coordinator there would hear."""

    links: MemoryLinks
    holdings: ResidentModels
    compute: ComputeThread
    host: StageHost
    heard: list[tuple[PeerId, Message]] = field(default_factory=list)
    listeners: list[Callable[[PeerId, Message], None]] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.links.id

    @property
    def load(self) -> ResidentLayers:
        return self.holdings.loads[0]

    @property
    def pool(self) -> KVPool:
        assert self.load.pool is not None
        return self.load.pool

    def hear(self, sender: PeerId, message: Message, payload: memoryview) -> None:
        if isinstance(message, Token):
            self.host.on_token(sender, message, payload)
        if isinstance(message, Error) and message.session is not None:
            self.host.on_error(sender, message)
        self.heard.append((sender, message))
        for listener in self.listeners:
            listener(sender, message)

    def told(self, kind: type[Any]) -> list[Any]:
        return [message for _, message in self.heard if isinstance(message, kind)]


class StageMesh:
    """Peers `a`, `b`, ...; each has the layers it is started with. Use as a context."""

    def __init__(self, spec: ModelSpec, weights: LoadedLayers) -> None:
        self.spec = spec
        self.weights = weights
        self.clock = QuickClock()
        self.peers: dict[PeerId, StagePeer] = {}
        self.down: set[frozenset[PeerId]] = set()
        self._tasks = asyncio.TaskGroup()
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._running:
            task.cancel()
        for peer in self.peers.values():
            peer.links.dispatcher.cancel_tasks()
        await self._tasks.__aexit__(*error)
        for peer in self.peers.values():
            peer.compute.close()

    def linked(self, one: PeerId, other: PeerId) -> bool:
        return one == other or frozenset((one, other)) not in self.down

    def start(self, name: str, layers: str = "0-4", *, blocks: int = ROOM_BLOCKS, outputs: int = 1 << 20) -> StagePeer:
        links = MemoryLinks(PeerId(name * 52), self)
        held, compute = LayerRange.parse(layers), ComputeThread()
        pool = KVPool(self.spec, held, blocks)
        load = ResidentLayers(card_of(self.spec), held, blocks * 32, 0, LoadState.ACTIVE, 1.0, weights=self.weights, pool=pool)
        holdings = ResidentModels(1e9, [load])
        host = StageHost(
            me=links.id,
            links=links,  # type: ignore[arg-type]
            holdings=holdings,
            compute=compute,
            clock=self.clock,
            telemetry=Telemetry(),
            story=Story(self.clock),
            outputs_limit_bytes=outputs,
            peer_linked=lambda peer: self.linked(links.id, peer),
            on_change=lambda: None,
        )
        peer = StagePeer(links, holdings, compute, host)
        host.register()
        for kind in (Token, Failed, Mirrored, Closed, Error):
            links.register(kind, peer.hear)
        links.dispatcher.group = self._tasks
        self.peers[links.id] = peer
        self._running.append(self._tasks.create_task(host.run()))
        return peer

    def cut(self, one: StagePeer, other: StagePeer) -> None:
        """The link between two peers goes down."""
        self.down.add(frozenset((one.id, other.id)))
        for peer, lost in ((one, other), (other, one)):
            peer.links.dispatcher.peer_lost(lost.id, "cut")
            peer.host.on_peer_gone(lost.id, "cut")

    def kill(self, lost: StagePeer) -> None:
        """Nobody is linked with this peer any more."""
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


class Driver:
    """Coordinates one session from a peer of the mesh, as `agents.answer` does. `opens` are the OPENED of the present epoch."""

    def __init__(self, mesh: StageMesh, at: StagePeer, prompt: list[int], max_tokens: int, **sampling: Any) -> None:
        self.mesh, self.at = mesh, at
        self.session = SESSION
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.sampling = SamplingParams(**{"temperature": 0.0, **sampling})
        self.tokens: list[int] = []
        self.epoch = 0
        self.credit = max_tokens
        self.chunk = 7
        self.lease_ms = 10_000
        self.mirrors: dict[int, StagePeer] = {}
        self.plan: Plan | None = None
        self.opens: list[Opened] = []
        self.positions: tuple[ResumePoint, ...] = ()
        self._changed = asyncio.Event()
        at.listeners.append(self._hear)

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def _hear(self, sender: PeerId, message: Message) -> None:
        if isinstance(message, Token) and message.epoch == self.epoch:
            assert message.index <= len(self.tokens), "a token was lost"
            if message.index == len(self.tokens):
                self.tokens.append(message.token)
        self._changed.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.01):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def made(self, tokens: int) -> None:
        """Wait until so many answer tokens are there."""
        await self.until(lambda: len(self.tokens) >= tokens)

    def plan_of(self, *stages: tuple[StagePeer, str]) -> Plan:
        planned = tuple(StagePlan(peer=peer.id, layers=LayerRange.parse(layers)) for peer, layers in stages)
        return Plan(id=PlanId("p"), model=MODEL, stages=planned, prefill_chunk_tokens=self.chunk, context=512)

    def opening(self, stage: int, *, resume: bool, **changes: Any) -> Callable[[int], Open]:
        assert self.plan is not None
        message = Open(
            request=0,
            session=self.session,
            epoch=self.epoch,
            plan=self.plan,
            stage=stage,
            coordinator=self.at.id,
            prompt_tokens=len(self.prompt),
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            lease_ms=self.lease_ms,
            credit=self.credit,
            answered=len(self.tokens),
            resume=resume,
        )
        return lambda request: msgspec.structs.replace(message, request=request, **changes)

    async def open(self, *stages: tuple[StagePeer, str], resume: bool = False, **changes: Any) -> None:
        """OPEN a new epoch with these stages."""
        self.plan = self.plan_of(*stages)
        self.epoch += 1
        self.opens = [await self.open_stage(stage, resume=resume, **changes) for stage in range(len(stages))]

    async def open_stage(self, stage: int, *, resume: bool, **changes: Any) -> Opened:
        assert self.plan is not None
        last = stage == len(self.plan.stages) - 1
        payload = self.ids() if last and needs_past_tokens(self.sampling, len(self.tokens)) else None
        peer = self.plan.stages[stage].peer
        opening = self.opening(stage, resume=resume, **changes)
        reply, _ = await self.at.links.request(peer, opening, payload, timeout_s=WAIT_S)
        return reply

    def ids(self, start: int = 0) -> memoryview:
        return np.asarray([*self.prompt, *self.tokens][start:], "<i4").data.cast("B")

    def resume(self) -> None:
        """RESUME and the known tokens, from what the stages hold."""
        held = [StageHeld(told.held, told.mirrored, told.kept_from, told.kept_to) for told in self.opens]
        self.positions = resume_positions(held, self.known)
        for stage, position in enumerate(self.positions):
            self.send(stage, Resume, stage=stage, start=position.start, send_from=position.send_from)
        self.send_prompt(self.positions[0].start)

    def send_prompt(self, start: int = 0) -> None:
        for position in range(start, self.known, self.chunk):
            tokens = min(self.chunk, self.known - position)
            payload = self.ids()[4 * position : 4 * (position + tokens)]
            last = position + tokens == self.known
            self.send(0, Prompt, payload, step=position, tokens=tokens, last=last)

    async def begin(self, *stages: tuple[StagePeer, str]) -> None:
        """A first epoch: OPEN and the prompt."""
        await self.open(*stages)
        self.send_prompt()

    async def go_on(self, *stages: tuple[StagePeer, str], **changes: Any) -> None:
        """A later epoch: OPEN, RESUME, the known tokens."""
        await self.open(*stages, resume=True, **changes)
        self.resume()

    def grant(self, credit: int) -> None:
        self.credit = credit
        self.send(0, Credit, index=credit)

    def mirror(self, stage: int, target: StagePeer | None, *, eager: bool = False) -> None:
        self.send(stage, Mirror, stage=stage, target=target.id if target else None, eager=eager)

    def renew(self, *peers: StagePeer) -> None:
        for peer in peers:
            self.at.links.send(peer.id, Renew(session=self.session, epoch=self.epoch, lease_ms=self.lease_ms))

    async def close(self, *peers: StagePeer) -> None:
        """Send CLOSE and wait until these peers have reported what they freed."""
        before = len(self.at.told(Closed))
        for peer in peers:
            self.at.links.send(peer.id, Close(session=self.session, epoch=self.epoch, reason="done"))
        await self.until(lambda: len(self.at.told(Closed)) == before + len(peers))

    def send(self, to: int, kind: type[Any], payload: memoryview | bytes | None = None, /, **fields: Any) -> None:
        assert self.plan is not None
        message = kind(session=self.session, epoch=self.epoch, **fields)
        self.at.links.send(self.plan.stages[to].peer, message, payload)
