"""Sessions that use two peers in opposite directions, over lanes with room for one frame of steps, never block one another."""

import asyncio
import random
from itertools import permutations

import msgspec
import pytest

from meshd.agents.service import MeshOptions
from sim.clients.client import Client
from sim.clients.requests import ClientRequest, Workload, make_request
from sim.network.wires import Path, Pipe
from sim.options import Options
from sim.patches import patched
from sim.toy.mathematics import MIB
from sim.world import World

WAYS = ("p0:0-3,p1:3-6", "p1:0-3,p0:3-6")
EACH_WAY = 2
"""Sessions at a time in each direction: with one alone, a lane is hardly ever full."""
STALL_S = 3.0
"""Longer than any step of a prompt takes here. A session that is stuck is found, and ended, only after 3 s without a token."""


class OppositeWays:
    """Two peers that hold the whole model, and clients that keep sessions in both directions running."""

    def __init__(self, seed: int, steps: int) -> None:
        self.world = World(seed, Options(peers=2))
        self.tokens = 0
        self._steps = steps
        self._clients: list[Client] = []
        for peer in self.world.peers.values():
            peer.spec.memory_bytes = 2048 * MIB
            peer.spec.speed.token_layer_s = 1e-4
        for pair in permutations(self.world.peers, 2):
            self.world.network.set_path(*pair, Path(delay_s=0.005, jitter_s=0.002, bandwidth_bytes_s=2e6))
        delivery = self.world.network.delivery
        delivery.queue_frames = 1
        self.full = 0
        """How often a lane was found full."""
        is_full = delivery._is_full

        def counted(pipe: Pipe) -> bool:
            full = is_full(pipe)
            self.full += full
            return full

        delivery._is_full = counted  # type: ignore[method-assign]

    def run(self) -> None:
        """Run until the two stages have computed so many steps of answer tokens. Raises: what a broken invariant raises."""
        world = self.world
        with patched(world):
            try:
                world.loop.run_until_complete(self._main())
            finally:
                self._close()

    async def _main(self) -> None:
        for peer in self.world.peers.values():
            peer.start()
        await asyncio.sleep(2.0)
        for way in WAYS:  # loads the layers
            await self._answer(way)
        self.world.worst = 0.0, ""
        self.tokens = 0
        async with asyncio.TaskGroup() as group:
            for way in WAYS * EACH_WAY:
                group.create_task(self._keep_asking(way))

    async def _keep_asking(self, way: str) -> None:
        while 2 * self.tokens < self._steps:
            await self._answer(way)

    async def _answer(self, way: str) -> None:
        client = Client(self.world, _request(self.world.rng_clients, self.world, way))
        await client.run()
        assert client.ended == "exact"
        assert not client.errors
        (correct,) = client.request.answers.values()
        self.tokens += correct.completion_tokens

    @property
    def losses(self) -> int:
        return sum(peer.counts()["losses"] for peer in self.world.peers.values())

    def _close(self) -> None:
        loop = self.world.loop
        for peer in self.world.peers.values():
            peer.kill(silently=True)
        for _ in range(20):
            if not (tasks := asyncio.all_tasks(loop)):
                break
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks, timeout=60.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _request(rng: random.Random, world: World, way: str) -> ClientRequest:
    """Return a request that runs to its end, on the stages of `way`."""
    request = make_request(rng, world.cards, Workload(requests=1, within_s=1.0, prompt=300, answer=200), 0, 0.0)
    request.generation = msgspec.structs.replace(request.generation, mesh=MeshOptions(stages=way), background=False)
    request.leaves_at = request.cancels_at = None
    request.reads_s, request.patience_s = 0.0, 75.0
    return request


@pytest.mark.parametrize("steps", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_sessions_in_opposite_directions_never_stall(steps: int) -> None:
    ways = OppositeWays(seed=1, steps=steps)
    ways.run()
    assert 2 * ways.tokens >= steps
    assert ways.full > 100
    assert ways.world.worst[0] < STALL_S, ways.world.worst
    assert ways.losses == 0
