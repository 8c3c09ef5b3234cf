"""A run of the simulator: peers, clients, faults, and what must hold during the run and at its end."""

import asyncio
import hashlib
import math
import random
import time
import traceback
from base64 import b32encode
from collections import Counter
from collections.abc import Coroutine, Iterable
from itertools import pairwise
from typing import Any

from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.resume import KEPT, MIRROR, PREFILL, REPLAY
from meshd.errors import MeshdError
from meshd.types import PeerId, SessionId
from sim.checks import Checks
from sim.client import Client, Connection, Wrong
from sim.faults import inject, make_faults
from sim.loop import SimLoop
from sim.network import SimNetwork
from sim.options import Options
from sim.outcome import Outcome
from sim.peer import Life, PeerSpec, SimPeer
from sim.requests import Load, make_wish, make_wishes
from sim.surroundings import virtual_time, watched_log
from sim.toy import MIB, Meter, Speed, toy_card
from sim.trace import Trace
from sim.wires import Path

METHODS = (KEPT, MIRROR, REPLAY, PREFILL)
_SETTLE_S = 15.0
"""So long after the last fault and the last client, no peer may hold anything that no coordinator needs."""
_UNREAD_S = 35.0
"""So long after that, nothing may be left: an answer that nobody reads is suspended after 30 s."""
_END_S = 150.0
"""So long after the last fault, every request must have ended."""
_AFTERMATH_S = 5.0
"""A peer counts as weak for so long after a fault has ended."""
_LATE_SHARE = 0.15
"""Share of the peers that join while the others already work."""
_CLOSING_ROUNDS = 20
_SOON_S = 6.0
"""Losses closer than this may take a session's record with them."""


class World:
    """One cluster and its clients. `run` gives the outcome; a broken invariant ends it."""

    def __init__(self, seed: int, options: Options, *, keep: int = 0, echo: bool = False) -> None:
        self.seed = seed
        self.options = options
        # A generator for each part: one more draw in one of them leaves the others as they were.
        self.rng_cluster = random.Random(f"{seed}-cluster")
        self.rng_faults = random.Random(f"{seed}-faults")
        self.rng_clients = random.Random(f"{seed}-clients")
        self.loop = SimLoop(random.Random(f"{seed}-threads"))
        self.meter = Meter()
        self.names: dict[PeerId, str] = {}
        self.trace = Trace(self.loop.time, self.names, keep=keep, echo=echo)
        self.network = SimNetwork(self.loop, random.Random(f"{seed}-network"), self.trace)
        self.network.repeats = options.repeats
        self.cards = tuple(toy_card(6 + number, name=f"toy{number or ''}") for number in range(options.models))
        self.peers: dict[PeerId, SimPeer] = {}
        self.sessions: dict[SessionId, Client] = {}
        self.connections: list[Connection] = []
        self.clients: list[Client] = []
        self.troubled: dict[PeerId, str] = {}
        self.weak_at = -math.inf
        """The last time at which the peers without a fault could not hold the models."""
        self.injected = 0
        self.worst = 0.0, ""
        """The longest pause between two tokens that a client saw, and where."""
        self.checks = Checks(self)
        self._losses: list[tuple[float, PeerId]] = []
        self._unwell_until: dict[PeerId, float] = {}
        for number in range(options.peers):
            self._add_peer(number)

    def _add_peer(self, number: int) -> None:
        rng = self.rng_cluster
        identity = b32encode(hashlib.sha256(f"{self.seed}-{number}".encode()).digest()).decode().lower().rstrip("=")
        layer_s = 10 ** rng.uniform(-3.0, -2.1)
        spec = PeerSpec(
            id=PeerId(identity),
            name=f"p{number}",
            memory_bytes=rng.choice([300, 400, 600]) * MIB,
            speed=Speed(token_layer_s=layer_s),
        )
        peer = SimPeer(self.loop, self.network, random.Random(rng.random()), self.meter, spec, self.cards, self.checks)
        for other in self.peers:
            for pair in ((spec.id, other), (other, spec.id)):
                delay = 10 ** rng.uniform(-4, -2)
                self.network.set_path(*pair, Path(delay, delay * rng.random(), 10 ** rng.uniform(6.5, 8.5)))
        self.peers[spec.id] = peer
        self.names[spec.id] = spec.name

    async def some_life(self) -> Life:
        """A peer that runs and is not leaving; waits for one."""
        while True:
            lives = [peer.life for peer in self.peers.values() if peer.life is not None and not peer.life.leaving]
            if lives:
                return self.rng_clients.choice(lives)
            await asyncio.sleep(0.5)

    def kill(self, peer: SimPeer, *, silently: bool = False) -> None:
        life = peer.life
        peer.kill(silently=silently)
        self._losses.append((self.loop.time(), peer.id))
        for connection in list(self.connections):
            if connection.life is life and not silently:
                connection.break_off("connection reset")

    def start(self, peer: SimPeer) -> None:
        if peer.life is None:
            peer.start()

    async def stop(self, peer: SimPeer) -> None:
        life = peer.life
        self._losses.append((self.loop.time(), peer.id))
        await peer.stop()
        for connection in list(self.connections):
            if connection.life is life:
                connection.break_off("connection closed")

    def trouble(self, peer: SimPeer, kind: str) -> None:
        self.injected += 1
        self.troubled[peer.id] = kind
        self._unwell_until[peer.id] = math.inf
        self.trace.note("fault", kind, peer.name)
        if kind in ("freeze", "isolate", "partition", "one-way cut", "harsh network", "stall"):
            self._losses.append((self.loop.time(), peer.id))
        self._weigh()

    def well_again(self, peer: SimPeer, kind: str) -> None:
        self._weigh()
        self.troubled.pop(peer.id, None)
        self._unwell_until[peer.id] = self.loop.time() + _AFTERMATH_S
        self.trace.note("over", kind, peer.name)
        if kind in ("freeze", "isolate", "partition", "one-way cut", "harsh network", "stall"):
            self._losses.append((self.loop.time(), peer.id))

    def trouble_all(self, kind: str) -> None:
        for peer in self.peers.values():
            if peer.id not in self.troubled:
                self.trouble(peer, kind)

    def all_well_again(self, kind: str) -> None:
        for peer in self.peers.values():
            if self.troubled.get(peer.id) == kind:
                self.well_again(peer, kind)

    async def do(self, life: Life, work: Coroutine[Any, Any, Any], within_s: float) -> None:
        """Run what a user asks of a peer. A refusal is not a failure of the run."""
        task = self.loop.create_task(work, context=life.owner.context())
        await asyncio.wait([task], timeout=within_s)
        task.cancel()
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None and not isinstance(error, MeshdError) and not life.dead:
            raise error

    def is_busy(self, peer: SimPeer) -> bool:
        return peer.life is not None and (peer.life.stages.sessions > 0 or self.coordinates(peer))

    def coordinates(self, peer: SimPeer) -> bool:
        return peer.life is not None and any(not answer.ended for answer in peer.life.coordinator.answers.values())

    def _weigh(self) -> None:
        """Note the time if the peers without a fault cannot hold the models together."""
        now = self.loop.time()
        per_layer = max(self.cards[0].layer_bytes)
        room = 0
        for peer in self.peers.values():
            if peer.life is None or self._unwell_until.get(peer.id, -math.inf) > now:
                continue
            room += max(0, int((0.9 * peer.spec.memory_bytes - 80 * MIB) // per_layer))
        if room < sum(card.spec.layers for card in self.cards):
            self.weak_at = now

    def judge_error(self, client: Client, life: Life, error: MeshdError) -> None:
        """Accept an error in the middle of an answer only if the mesh was weak since the request, or its peer has a fault.

        Raises: Wrong.
        """
        self._weigh()
        if not self.is_unwell(life) and self.weak_at < client.began - _AFTERMATH_S and not life.leaving:
            what = f"client {client.wish.number} got {type(error).__name__}"
            raise Wrong(f"{what} though the peers that are well can hold the model: {error}")

    def note_pause(self, client: Client, pause_s: float) -> None:
        if pause_s > self.worst[0]:
            self.worst = pause_s, f"client {client.wish.number} at {self.loop.time():.2f}, event {len(client.wish.seen)}"

    def is_unwell(self, life: Life) -> bool:
        """Whether this peer has a fault, or had one recently."""
        return self._unwell_until.get(life.spec.id, -math.inf) > self.loop.time() - _AFTERMATH_S

    def may_have_lost(self, coordinators: list[Life]) -> bool:
        """Whether several peers were lost at about the same time: only then may a session's record be gone."""
        times = sorted(at for at, _ in self._losses)
        close = any(later - earlier < _SOON_S for earlier, later in pairwise(times))
        return close or any(self.loop.time() - at < _SOON_S for at in times)

    def run(self) -> Outcome:
        """Run everything. A broken invariant does not raise: it is the outcome's `failure`."""
        outcome = Outcome(self.seed)
        began = time.perf_counter()
        with virtual_time(self.loop, self.meter), watched_log(self.loop, self.trace):
            try:
                self.loop.run_until_complete(self._main())
            except AssertionError as error:
                outcome.failure = f"{type(error).__name__} at {self.loop.time():.6f}: {error}"
            except Exception as error:
                outcome.failure = f"{type(error).__name__} at {self.loop.time():.6f}: {error}\n{traceback.format_exc()}"
            finally:
                self._fill(outcome)
                outcome.real_s = time.perf_counter() - began
                self._close()
        return outcome

    def _fill(self, outcome: Outcome) -> None:
        outcome.digest = self.trace.digest
        outcome.callbacks = self.loop.callbacks
        outcome.messages = self.network.messages
        done = sum((peer.done() for peer in self.peers.values()), Counter[str]())
        outcome.steps, outcome.plans, outcome.recoveries = done["steps"], done["plans"], done["recoveries"]
        outcome.events = self.loop.timers_run
        outcome.searches, outcome.searching_s = done["searches"], sum(peer.searching_s for peer in self.peers.values())
        outcome.methods = Counter({name: done[name] for name in METHODS if done[name]})
        outcome.checks = self.checks.count
        outcome.faults = self.injected
        outcome.virtual_s = self.loop.time() - 1000.0
        outcome.exact = sum(client.ended == "exact" for client in self.clients)
        outcome.cancelled = sum(client.ended == "cancelled" for client in self.clients)
        outcome.client_errors = sum(len(client.errors) for client in self.clients)
        outcome.pauses = [pause for client in self.clients for pause in client.pauses]
        outcome.worst = self.worst
        outcome.lines = list(self.trace.lines)

    def _close(self) -> None:
        """End all tasks that are left: a coroutine that is only garbage-collected would run outside the loop."""
        for peer in self.peers.values():
            peer.kill(silently=True)
        try:
            for _ in range(_CLOSING_ROUNDS):
                tasks = asyncio.all_tasks(self.loop)
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                self.loop.run_until_complete(_wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    async def _main(self) -> None:
        options = self.options
        late = [peer for peer in list(self.peers.values())[2:] if self.rng_cluster.random() < _LATE_SHARE]
        for peer in self.peers.values():
            if peer not in late:
                peer.start()
        await asyncio.sleep(1.0)
        await self._place()
        for peer in late:
            self.loop.call_later(self.rng_cluster.random() * options.within_s, self.start, peer)
        for peer in self.peers.values():
            if peer.life is not None:
                peer.life.usual = peer.life.tasks()
        if options.events:
            await self._go_on()
        else:
            await self._short()
        await asyncio.sleep(_SETTLE_S)
        self.checks.nothing_unwanted()
        if any(peer.life is not None and peer.life.left_over() for peer in self.peers.values()):
            await asyncio.sleep(_UNREAD_S)
        self.checks.nothing_left()

    def _load(self) -> Load:
        options = self.options
        return Load(requests=options.requests, within_s=options.within_s, prompt=options.prompt, answer=options.answer)

    async def _short(self) -> None:
        """Draw all requests and faults first, then run them."""
        options = self.options
        self.clients = [Client(self, wish) for wish in make_wishes(self.rng_clients, self.cards, self._load())]
        faults = make_faults(self.rng_faults, options.faults, options.within_s, options.kinds)
        asking = [self.loop.create_task(client.run()) for client in self.clients]
        going_wrong = [self.loop.create_task(inject(self, fault)) for fault in faults]
        await self._all(going_wrong)
        await self._all(asking, _END_S, "requests have not ended: " + ", ".join(map(str, faults)))

    async def _go_on(self) -> None:
        """Requests and faults arrive until the run ends, on average `requests` and `faults` in `within_s`."""
        asking = self.loop.create_task(self._keep_asking())
        going_wrong = self.loop.create_task(self._keep_failing())
        await self._all([going_wrong])
        await self._all([asking], _END_S, "requests have not ended")

    def _over(self) -> bool:
        return self.loop.timers_run >= self.options.events

    async def _keep_asking(self) -> None:
        load, number = self._load(), 0
        async with asyncio.TaskGroup() as group:
            while not self._over():
                await asyncio.sleep(self.rng_clients.expovariate(load.requests / load.within_s))
                client = Client(self, make_wish(self.rng_clients, self.cards, load, number, 0.0))
                self.clients.append(client)
                group.create_task(client.run())
                number += 1

    async def _keep_failing(self) -> None:
        options = self.options
        async with asyncio.TaskGroup() as group:
            while not self._over():
                await asyncio.sleep(self.rng_faults.expovariate(max(1, options.faults) / options.within_s))
                if options.churn and not self._over():
                    [fault] = make_faults(self.rng_faults, 1, 0.0, options.kinds)
                    group.create_task(inject(self, fault))

    async def _all(self, tasks: list[Any], within_s: float | None = None, what: str = "") -> None:
        if not tasks:
            return
        watched = [*tasks]
        done, waiting = await asyncio.wait(watched, timeout=within_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            _raise_first(task)
        if waiting:
            stuck = [str(client.wish.number) for client in self.clients if not client.ended]
            raise Wrong(f"{what}; clients {', '.join(stuck)}")

    async def _place(self) -> None:
        """Place the models ahead of requests in some runs; in the others the first request does."""
        if self.rng_cluster.random() < 0.3:
            return
        first = next(iter(self.peers.values())).life
        assert first is not None

        async def place() -> None:
            for card in self.cards:
                async for _ in first.agents.placer.place(card, MeshOptions(min_peers=self.rng_cluster.choice([1, 2, 2, 3]))):
                    pass

        task = self.loop.create_task(place(), context=first.owner.context())
        await asyncio.wait([task])
        if isinstance(task.exception(), MeshdError):
            return
        task.result()
        await asyncio.sleep(1.0)


def _raise_first(task: "asyncio.Task[Any]") -> None:
    """Raise the first error of a task, unpacked from its exception groups."""
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error


async def _wait(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    await asyncio.wait(list(tasks), timeout=60.0)
