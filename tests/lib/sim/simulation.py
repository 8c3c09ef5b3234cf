"""A whole run of the simulator: starts the cluster, its clients and its faults, and checks what is left at the end."""

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.resume import KEPT, MIRROR, PREFILL, REPLAY
from meshd.errors import MeshdError, Overloaded, first_error
from sim.clients.client import Client, WrongAnswer
from sim.clients.requests import Workload, make_request, make_requests
from sim.faults import inject, make_faults
from sim.options import Options
from sim.outcome import Outcome
from sim.patches import patched
from sim.peer.compute import STEP_COUNTS
from sim.peer.inspection import leftovers
from sim.world import World

_METHODS = (KEPT, MIRROR, REPLAY, PREFILL)
_SETTLE_S = 15.0
"""Seconds after all faults and clients have ended until no peer may hold a lease of a session without a coordinator."""
_UNREAD_S = 35.0
"""Seconds after `_SETTLE_S` until nothing of any session may be left: an answer without a reader is suspended after 30 s."""
_END_S = 150.0
"""Seconds after the last fault within which every request must end."""
_LATE_SHARE = 0.15
"""Probability that a peer, other than the first two, starts only while clients already send requests."""
_CLOSING_ROUNDS = 20


def simulate(seed: int, options: Options, *, keep: int = 0, echo: bool = False) -> Outcome:
    """Run the simulator once.

    The outcome contains the last `keep` lines of the trace; with `echo` all lines are printed. A broken invariant ends the run. It
    is not raised, but reported as the outcome's `failure`.
    """
    return _Simulation(World(seed, options, keep=keep, echo=echo)).run()


class _Simulation:
    def __init__(self, world: World) -> None:
        self._world = world
        self._options = world.options
        self._loop = world.loop
        self._clients: list[Client] = []

    def run(self) -> Outcome:
        world = self._world
        outcome = Outcome(world.seed)
        began = time.perf_counter()
        with patched(world):
            try:
                self._loop.run_until_complete(self._main())
            except AssertionError as error:
                outcome.failure = f"{type(error).__name__} at {self._loop.time():.6f}: {error}"
            except Exception as error:
                outcome.failure = f"{type(error).__name__} at {self._loop.time():.6f}: {error}\n{traceback.format_exc()}"
            finally:
                self._fill(outcome)
                outcome.real_s = time.perf_counter() - began
                self._close()
        return outcome

    def _fill(self, outcome: Outcome) -> None:
        world, clients = self._world, self._clients
        outcome.digest = world.trace.digest
        outcome.callbacks = self._loop.callbacks
        outcome.messages = world.network.delivery.messages
        counts = sum((peer.counts() for peer in world.peers.values()), Counter[str]())
        outcome.losses = counts["losses"]
        outcome.steps, outcome.plans, outcome.recoveries = counts["steps"], counts["plans"], counts["recoveries"]
        outcome.events = self._loop.timers_run
        outcome.searches, outcome.searching_s = counts["searches"], sum(peer.searching_s for peer in world.peers.values())
        outcome.methods = Counter({name: counts[name] for name in _METHODS if counts[name]})
        outcome.kinds = Counter({name: counts[name] for name in STEP_COUNTS}) + world.drafts.guessed
        outcome.checks = world.checks.count
        outcome.faults = world.health.injected
        outcome.virtual_s = self._loop.time() - 1000.0
        outcome.exact = sum(client.ended == "exact" for client in clients)
        outcome.mixed = sum(client.ended == "mixed" for client in clients)
        outcome.cancelled = sum(client.ended == "cancelled" for client in clients)
        outcome.refused = sum(error.startswith(Overloaded.code) for client in clients for error in client.errors)
        outcome.client_errors = sum(len(client.errors) for client in clients)
        outcome.pauses = [pause for client in clients for pause in client.pauses]
        outcome.worst = world.worst
        outcome.lines = list(world.trace.lines)

    def _close(self) -> None:
        """Cancel and await all remaining tasks. Otherwise the garbage collector would close their coroutines outside the loop."""
        for peer in self._world.peers.values():
            peer.kill(silently=True)
        try:
            for _ in range(_CLOSING_ROUNDS):
                tasks = asyncio.all_tasks(self._loop)
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(_wait(tasks))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        world, options = self._world, self._options
        late = [peer for peer in list(world.peers.values())[2:] if world.rng_cluster.random() < _LATE_SHARE]
        for peer in world.peers.values():
            if peer not in late:
                peer.start()
        await asyncio.sleep(1.0)
        await self._place()
        for peer in late:
            self._loop.call_later(world.rng_cluster.random() * options.within_s, world.start, peer)
        for peer in world.peers.values():
            if peer.process is not None:
                peer.process.idle_tasks = peer.process.tasks()
        if options.events:
            await self._run_until_events()
        else:
            await self._run_fixed()
        await asyncio.sleep(_SETTLE_S)
        world.checks.one_key()
        world.checks.no_orphaned_leases()
        if any(peer.process is not None and leftovers(peer.process) for peer in world.peers.values()):
            await asyncio.sleep(_UNREAD_S)
        world.checks.nothing_left()

    def _workload(self) -> Workload:
        options = self._options
        return Workload(
            requests=options.requests,
            within_s=options.within_s,
            prompt=options.prompt,
            answer=options.answer,
            numerics=options.numerics,
        )

    async def _run_fixed(self) -> None:
        """Run a fixed number of requests and faults, which are all drawn at the start."""
        world, options = self._world, self._options
        requests = make_requests(world.rng_clients, world.cards, self._workload())
        self._clients = [Client(world, request) for request in requests]
        faults = make_faults(world.rng_faults, options.faults, options.within_s, options.kinds)
        client_tasks = [self._loop.create_task(client.run()) for client in self._clients]
        fault_tasks = [self._loop.create_task(inject(world, fault)) for fault in faults]
        await self._wait_for(fault_tasks)
        await self._wait_for(client_tasks, _END_S, "requests have not ended: " + ", ".join(map(str, faults)))

    async def _run_until_events(self) -> None:
        """Start random requests and faults until `events` timers have fired, at rates of `requests` and `faults` per `within_s`."""
        requests = self._loop.create_task(self._keep_requesting())
        faults = self._loop.create_task(self._keep_injecting())
        await self._wait_for([faults])
        await self._wait_for([requests], _END_S, "requests have not ended")

    def _over(self) -> bool:
        return self._loop.timers_run >= self._options.events

    async def _keep_requesting(self) -> None:
        world, workload, number = self._world, self._workload(), 0
        async with asyncio.TaskGroup() as group:
            while not self._over():
                await asyncio.sleep(world.rng_clients.expovariate(workload.requests / workload.within_s))
                client = Client(world, make_request(world.rng_clients, world.cards, workload, number, 0.0))
                self._clients.append(client)
                group.create_task(client.run())
                number += 1

    async def _keep_injecting(self) -> None:
        world, options = self._world, self._options
        async with asyncio.TaskGroup() as group:
            while not self._over():
                await asyncio.sleep(world.rng_faults.expovariate(max(1, options.faults) / options.within_s))
                if options.churn and not self._over():
                    [fault] = make_faults(world.rng_faults, 1, 0.0, options.kinds)
                    group.create_task(inject(world, fault))

    async def _wait_for(self, tasks: list[Any], within_s: float | None = None, what: str = "") -> None:
        """Wait for tasks to end. Raises: the first error of a task; WrongAnswer if some have not ended in time."""
        if not tasks:
            return
        done, waiting = await asyncio.wait(tasks, timeout=within_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            _raise_first(task)
        if waiting:
            stuck = [str(client.request.number) for client in self._clients if not client.ended]
            raise WrongAnswer(f"{what}; clients {', '.join(stuck)}")

    async def _place(self) -> None:
        """In 70 % of the runs, place the models before the first request. In the other runs, requests place them."""
        world = self._world
        if world.rng_cluster.random() < 0.3:
            return
        first = next(iter(world.peers.values())).process
        assert first is not None

        async def place() -> None:
            for card in world.cards:
                async for _ in first.agents.placer.place(card, MeshOptions(min_peers=world.rng_cluster.choice([1, 2, 2, 3]))):
                    pass

        task = self._loop.create_task(place(), context=first.owner.context())
        await asyncio.wait([task])
        if isinstance(task.exception(), MeshdError):
            return
        task.result()
        await asyncio.sleep(1.0)


def _raise_first(task: "asyncio.Task[Any]") -> None:
    """Raise the task's error, if it has one; of an exception group, raise the first error."""
    error = task.exception()
    if error is not None:
        raise first_error(error)


async def _wait(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    await asyncio.wait(list(tasks), timeout=60.0)
