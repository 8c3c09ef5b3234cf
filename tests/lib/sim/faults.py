"""The faults of a run: their kinds, random schedules, and a function for each kind that injects it."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshd.agents.service import MeshOptions
from meshd.agents.session.session import SessionState
from meshd.errors import InvalidRequest
from sim.network.wires import HarshNetwork

if TYPE_CHECKING:
    from meshd.agents.session.answer import Answer
    from meshd.types import PeerId
    from sim.peer.peer import SimPeer
    from sim.peer.process import SimProcess
    from sim.world import World


@dataclass(frozen=True, slots=True)
class Fault:
    """One scheduled fault. Its victim is chosen when it begins."""

    at: float
    kind: str
    lasts_s: float
    chance: float
    """Random number, at least 0 and less than 1, that selects the victim and for some kinds the severity."""

    def __str__(self) -> str:
        return f"{self.kind} at {self.at:.2f} for {self.lasts_s:.2f} s"


Inject = Callable[["World", Fault], Awaitable[None]]
_KINDS: dict[str, Inject] = {}
_LASTS: dict[str, tuple[float, float]] = {}
"""Shortest and longest duration of a fault in seconds, by kind."""


def _fault(kind: str, shortest_s: float, longest_s: float) -> Callable[[Inject], Inject]:
    """Register the decorated function as the injector of this kind of fault."""

    def register(inject: Inject) -> Inject:
        _KINDS[kind], _LASTS[kind] = inject, (shortest_s, longest_s)
        return inject

    return register


def kinds() -> tuple[str, ...]:
    return tuple(_KINDS)


def make_faults(rng: random.Random, count: int, within_s: float, only: tuple[str, ...] | None = None) -> list[Fault]:
    """Return `count` random faults, sorted by time. A third begin up to 2.5 s after another one, to hit a recovery."""
    faults: list[Fault] = []
    for _ in range(count):
        close = faults and rng.random() < 0.35
        at = faults[-1].at + rng.uniform(0, 2.5) if close else rng.uniform(0, within_s)
        kind = rng.choice(only or kinds())
        faults.append(Fault(at, kind, rng.uniform(*_LASTS[kind]), rng.random()))
    return sorted(faults, key=lambda fault: fault.at)


async def inject(world: "World", fault: Fault) -> None:
    """Wait for the fault's time, begin it, and return when it has ended."""
    await asyncio.sleep(fault.at)
    await _KINDS[fault.kind](world, fault)


def _pick(world: "World", fault: Fault) -> "SimPeer | None":
    """Return a running peer without a fault, in 70 % of the cases one with a session. None: fewer than two such peers run."""
    free = [peer for peer in world.peers.values() if peer.process is not None and peer.id not in world.health.faulty]
    if len(free) < 2:
        return None
    busy = [peer for peer in free if world.is_busy(peer)]
    chosen = busy if busy and fault.chance < 0.7 else free
    return chosen[int(fault.chance * 1000) % len(chosen)]


async def _process_fault(
    world: "World",
    fault: Fault,
    begin: Callable[["SimPeer"], None],
    end: Callable[["SimPeer"], None],
    victim: "SimPeer | None" = None,
) -> None:
    """Inject a fault into `victim`, or into a peer that `_pick` chooses, and end the fault after its duration."""
    peer = victim or _pick(world, fault)
    if peer is None:
        return
    world.health.begin(peer, fault.kind)
    begin(peer)
    await asyncio.sleep(fault.lasts_s)
    end(peer)
    world.health.end(peer, fault.kind)


@_fault("kill", 0.3, 20.0)
async def _kill(world: "World", fault: Fault) -> None:
    await _process_fault(world, fault, lambda peer: world.kill(peer), lambda peer: world.start(peer))


@_fault("kill coordinator", 0.3, 20.0)
async def _kill_coordinator(world: "World", fault: Fault) -> None:
    free = [peer for peer in world.peers.values() if peer.process is not None and peer.id not in world.health.faulty]
    coordinators = [peer for peer in free if world.coordinates(peer)]
    if coordinators and len(free) > 1:
        victim = coordinators[int(fault.chance * 1000) % len(coordinators)]
        await _process_fault(world, fault, lambda peer: world.kill(peer), lambda peer: world.start(peer), victim)


@_fault("power cut", 0.3, 20.0)
async def _power_cut(world: "World", fault: Fault) -> None:
    await _process_fault(world, fault, lambda peer: world.kill(peer, silently=True), lambda peer: world.start(peer))


@_fault("freeze", 0.2, 12.0)
async def _freeze(world: "World", fault: Fault) -> None:
    await _process_fault(world, fault, lambda peer: peer.freeze(), lambda peer: peer.thaw())


@_fault("stall", 1.0, 30.0)
async def _stall(world: "World", fault: Fault) -> None:
    """Make a peer's compute thread hang, while its event loop and links work."""
    processes = {}

    def begin(peer: "SimPeer") -> None:
        processes[peer.id] = peer.process
        if peer.process is not None:
            peer.process.compute.stall()

    def end(peer: "SimPeer") -> None:
        process = processes[peer.id]
        if process is not None and not process.killed:
            process.compute.end_stall()

    await _process_fault(world, fault, begin, end)


@_fault("slow peer", 1.0, 10.0)
async def _slow_peer(world: "World", fault: Fault) -> None:
    factor = 10 ** (1 + fault.chance)
    await _process_fault(world, fault, lambda peer: peer.set_slow(factor), lambda peer: peer.set_slow(1.0))


@_fault("garbage", 0.5, 5.0)
async def _garbage(world: "World", fault: Fault) -> None:
    def set_garbage(peer: "SimPeer", garbage: str) -> None:
        peer.spec.speed.garbage = garbage

    await _process_fault(world, fault, lambda peer: set_garbage(peer, "nan"), lambda peer: set_garbage(peer, ""))


@_fault("leave", 0.5, 15.0)
async def _leave(world: "World", fault: Fault) -> None:
    """Stop the peer by SIGTERM, and start it again some time later."""
    peer = _pick(world, fault)
    if peer is None:
        return
    world.health.begin(peer, fault.kind)
    await world.stop(peer)
    await asyncio.sleep(fault.lasts_s)
    world.start(peer)
    world.health.end(peer, fault.kind)


def _pick_pair(world: "World", fault: Fault) -> tuple["SimPeer", "SimPeer"] | None:
    free = [peer for peer in world.peers.values() if peer.id not in world.health.faulty]
    if len(free) < 2:
        return None
    first = free.pop(int(fault.chance * 1000) % len(free))
    return first, free[int(fault.chance * 7919) % len(free)]


async def _pair_fault(
    world: "World",
    fault: Fault,
    begin: Callable[["SimPeer", "SimPeer"], None],
    end: Callable[["SimPeer", "SimPeer"], None],
) -> None:
    """Inject a fault between two random peers, and end the fault after its duration."""
    pair = _pick_pair(world, fault)
    if pair is None:
        return
    for peer in pair:
        world.health.begin(peer, fault.kind)
    begin(*pair)
    await asyncio.sleep(fault.lasts_s)
    end(*pair)
    for peer in pair:
        world.health.end(peer, fault.kind)


@_fault("partition", 0.2, 15.0)
async def _partition(world: "World", fault: Fault) -> None:
    """Cut both directions between two peers, without notice to either."""

    def begin(one: "SimPeer", other: "SimPeer") -> None:
        world.network.cut(one.id, other.id)
        world.network.cut(other.id, one.id)

    def end(one: "SimPeer", other: "SimPeer") -> None:
        world.network.heal(one.id, other.id)
        world.network.heal(other.id, one.id)

    await _pair_fault(world, fault, begin, end)


@_fault("one-way cut", 0.2, 15.0)
async def _one_way(world: "World", fault: Fault) -> None:
    await _pair_fault(
        world,
        fault,
        lambda one, other: world.network.cut(one.id, other.id),
        lambda one, other: world.network.heal(one.id, other.id),
    )


@_fault("isolate", 0.2, 15.0)
async def _isolate(world: "World", fault: Fault) -> None:
    """Cut a peer off from all peers without a fault, without notice to either side."""

    def others(peer: "SimPeer") -> list["SimPeer"]:
        return [other for other in world.peers.values() if other is not peer]

    cut: list[SimPeer] = []

    def begin(peer: "SimPeer") -> None:
        cut.extend(other for other in others(peer) if other.id not in world.health.faulty)
        for other in cut:
            world.network.cut(peer.id, other.id)
            world.network.cut(other.id, peer.id)

    def end(peer: "SimPeer") -> None:
        for other in cut:
            world.network.heal(peer.id, other.id)
            world.network.heal(other.id, peer.id)

    await _process_fault(world, fault, begin, end)


@_fault("flap", 0.0, 3.0)
async def _flap(world: "World", fault: Fault) -> None:
    """Reset the link between two peers, perhaps several times. Both live on, so nobody may notice: neither is marked as faulty."""
    pair = _pick_pair(world, fault)
    if pair is None:
        return
    world.health.injected += 1
    until, every_s = world.loop.time() + fault.lasts_s, 0.1 + 0.4 * fault.chance
    while True:
        world.trace.note("flap", *(peer.name for peer in pair))
        world.network.break_link(*(peer.id for peer in pair))
        if world.loop.time() >= until:
            return
        await asyncio.sleep(every_s)


@_fault("slow link", 1.0, 10.0)
async def _slow_link(world: "World", fault: Fault) -> None:
    """Make the link between two peers a hundred times slower."""

    def set_slow(one: "SimPeer", other: "SimPeer", slow: float) -> None:
        world.network.path(one.id, other.id).slow = slow
        world.network.path(other.id, one.id).slow = slow

    await _pair_fault(world, fault, lambda one, other: set_slow(one, other, 100.0), lambda one, other: set_slow(one, other, 1.0))


@_fault("drain", 0.5, 8.0)
async def _drain(world: "World", fault: Fault) -> None:
    """Drain a peer, so that its sessions move away, then let it take work again."""
    peer = _pick(world, fault)
    if peer is None or peer.process is None:
        return
    world.health.begin(peer, fault.kind)
    process = peer.process
    await world.do(process, process.drainer.drain(process.spec.id, False, fault.lasts_s), fault.lasts_s)
    if not process.killed:
        await world.do(process, process.drainer.drain(process.spec.id, True, 1.0), 2.0)
    world.health.end(peer, fault.kind)


@_fault("move", 0.0, 0.1)
async def _move(world: "World", fault: Fault) -> None:
    """Move one peer's part of a decoding answer, as a user may. This disturbs no peer, so none is marked as faulty."""
    decoding = [
        (peer.process, answer)
        for peer in world.peers.values()
        if peer.process is not None and not peer.frozen
        for answer in peer.process.coordinator.answers.values()
        if answer.machine.state is SessionState.DECODING
    ]
    if not decoding:
        return
    process, answer = decoding[int(fault.chance * 1000) % len(decoding)]
    assert answer.plan is not None
    sources = answer.plan.peers
    targets = [peer for peer in world.peers if peer not in sources]
    if targets:
        source, target = sources[int(fault.chance * 6007) % len(sources)], targets[int(fault.chance * 7919) % len(targets)]
        world.health.injected += 1
        world.trace.note("move", process.spec.name, answer.session[:6], world.names[source], world.names[target])
        await world.do(process, _load_and_move(process, answer, source, target, world.names[target]), 30.0)


async def _load_and_move(process: "SimProcess", answer: "Answer", source: "PeerId", target: "PeerId", name: str) -> None:
    """Move an answer's stages at `source` to `target`. If the model is not loaded there, load all of it first."""
    plan = answer.plan
    assert plan is not None
    try:
        process.coordinator.router.with_target(answer.card, plan, target, source)
    except InvalidRequest:
        options = MeshOptions(stages=f"{name}:0-{answer.card.spec.layers}")
        async for _ in process.agents.placer.place(answer.card, options):
            pass
    await process.coordinator.move(answer.session, target, source)


@_fault("harsh network", 0.5, 5.0)
async def _harsh(world: "World", fault: Fault) -> None:
    """Drop, repeat and reorder some messages on all links.

    TCP never loses a message on a link that stays up. So at the end, each link that has lost one is reset.
    """
    world.health.begin_all(fault.kind)
    level = fault.chance * 0.05
    world.network.delivery.harsh = HarshNetwork(drop=level, repeat=level, reorder=level)
    await asyncio.sleep(fault.lasts_s)
    world.network.delivery.harsh = HarshNetwork()
    world.network.break_lossy()
    world.health.end_all(fault.kind)


def _owners(world: "World") -> list["SimProcess"]:
    """Return the processes at which the owner can rotate the key now."""
    return [peer.process for peer in world.peers.values() if peer.process is not None and not peer.frozen]


@_fault("rotate", 0.0, 0.5)
async def _rotate(world: "World", fault: Fault) -> None:
    """Rotate the cluster key, in a third of the cases on two devices at the same moment. This disturbs no peer."""
    owners = [process for process in _owners(world) if process.spec.id not in world.excluded]
    if not owners:
        return
    world.health.injected += 1
    first = int(fault.chance * 1000) % len(owners)
    chosen = [owners[first]] if fault.chance < 0.67 else [owners[first], owners[first - 1]]
    await asyncio.gather(*(world.rotate(process) for process in chosen))


@_fault("exclude", 1.0, 15.0)
async def _exclude(world: "World", fault: Fault) -> None:
    """Exclude a peer from the cluster, and later let it in again."""
    peer = _pick(world, fault)
    if peer is None or world.excluded:
        return
    world.health.begin(peer, fault.kind)
    world.excluded.add(peer.id)
    await _decide(world, peer.id)
    await asyncio.sleep(fault.lasts_s)
    world.excluded.discard(peer.id)
    await _decide(world, peer.id)
    world.health.end(peer, fault.kind)


async def _decide(world: "World", subject: "PeerId") -> None:
    """Rotate until the rotation that counts says of `subject` what the owner wants."""
    wanted = subject not in world.excluded
    for _ in range(100):
        owners = [
            process for process in _owners(world) if process.spec.id != subject and process.spec.id not in world.health.faulty
        ]
        for process in owners[:1]:
            await world.rotate(process)
        await asyncio.sleep(1.0)
        newest = [process.trust.chain.last for process in owners]
        if newest and all(record is not None and (subject in record.peers) is wanted for record in newest):
            return
