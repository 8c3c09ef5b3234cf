"""Places a model over the mesh: asks the planner where, tells the peers, and says how far they are."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from meshd.agents.library import Library
from meshd.agents.links import Links
from meshd.agents.questions import problem_of
from meshd.agents.service import MeshOptions, PlacementStep
from meshd.clock import Clock
from meshd.errors import DoesNotFit
from meshd.planner.memory import allowed_bytes, stage_memory
from meshd.planner.problem import PlanInput
from meshd.planner.solve import Solution, solve
from meshd.protocol.messages import Place, Unplace, Unplaced
from meshd.types import Advert, Holding, LayerRange, ModelCard, ModelId, PeerId, StagePlan

_USUAL_CONTEXT = 16_384
"""KV is placed for this context at most, unless a request asks for more."""
_LEAST_CONTEXT = 512
_SESSIONS_OF_KV = 4
"""Whole contexts that a placement holds room for, where memory allows."""
_DEADLINE_S = 3600.0
"""A download over a slow line may be part of it."""
_UNPLACE_S = 10.0
_PROGRESS_S = 0.2
_ADVERTISED_S = 5.0


@dataclass(slots=True)
class Placer:
    """Any peer can place a model on any others."""

    links: Links
    library: Library
    adverts: Callable[[], list[Advert]]
    names: Callable[[PeerId], str]
    clock: Clock

    async def place(self, card: ModelCard, mesh: MeshOptions, *, context: int | None = None) -> AsyncGenerator[PlacementStep, None]:
        """Load the model where the planner, or `mesh.stages`, says; the steps of every peer as they change.

        `context` None: the usual one, or less if memory allows no more. Raises: InvalidRequest, NoPeer, DoesNotFit, and what a peer
        could not do. Cancel: peers that have begun finish their part.
        """
        problem, solution = self._solve(card, mesh, context)
        loop = asyncio.get_running_loop()
        running = {stage: loop.create_task(self._ask(card, stage, self._kv_tokens(problem, stage))) for stage in solution.stages}
        try:
            async with aclosing(self._watch(card, running)) as steps:
                async for step in steps:
                    yield step
            for task in running.values():
                task.result()
            await self._advertised(card.id, solution.stages)
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _advertised(self, model: ModelId, stages: tuple[StagePlan, ...]) -> None:
        """Wait until the adverts tell what the replies did: routes are planned from adverts. Gives up after a while."""
        until = self.clock.monotonic() + _ADVERTISED_S
        while self.clock.monotonic() < until and not all(self._active(model, stage) for stage in stages):
            await self.clock.sleep(_PROGRESS_S / 10)

    def _active(self, model: ModelId, stage: StagePlan) -> bool:
        return any(
            holding.model == model and holding.state == "active" and stage.layers in holding.layers
            for advert in self.adverts()
            if advert.peer == stage.peer
            for holding in advert.holdings
        )

    async def unplace(self, model: ModelId) -> int:
        """Have every live peer let go of a model; bytes that get free. Raises: PeerFault."""
        holders = [advert.peer for advert in self.adverts() if any(held.model == model for held in advert.holdings)]
        freed = 0
        for peer in holders:
            request = Unplace(request=self.links.next_request(), model=model)
            reply, _ = await self.links.request(peer, request, timeout_s=_UNPLACE_S)
            freed += reply.freed_bytes if isinstance(reply, Unplaced) else 0
        return freed

    def progress(self, model: ModelId) -> float:
        """Of the loads under way for a model, the least; 1 if there are none."""
        return min((held.progress for advert in self.adverts() for held in advert.holdings if held.model == model), default=1.0)

    def _solve(self, card: ModelCard, mesh: MeshOptions, context: int | None) -> tuple[PlanInput, Solution]:
        """Halve a context that nobody asked for until it fits."""
        wanted = max(context or 0, min(card.spec.context_length, _USUAL_CONTEXT))
        while True:
            problem = problem_of(card, self.adverts(), mesh, context=wanted)
            try:
                return problem, solve(problem)
            except DoesNotFit:
                smaller = max(context or 0, wanted // 2)
                if smaller < _LEAST_CONTEXT or smaller == wanted:
                    raise
                wanted = smaller

    def _kv_tokens(self, problem: PlanInput, stage: StagePlan) -> int:
        """Room for several whole contexts, if the peer has it."""
        profile = problem.profile(stage.peer)
        assert profile is not None
        used = stage_memory(problem, stage)
        spare = allowed_bytes(problem, profile) - used.total_bytes
        more = int(spare // max(1, used.kv_bytes))
        return problem.context * (1 + max(0, min(_SESSIONS_OF_KV - 1, more)))

    async def _ask(self, card: ModelCard, stage: StagePlan, kv_tokens: int) -> None:
        request = Place(
            request=self.links.next_request(),
            model=card.id,
            ref=card.ref,
            layers=stage.layers,
            kv_tokens=kv_tokens,
            deadline_ms=int(_DEADLINE_S * 1000),
        )
        await self.links.request(stage.peer, request, timeout_s=_DEADLINE_S)

    async def _watch(self, card: ModelCard, running: dict[StagePlan, "asyncio.Task[None]"]) -> AsyncGenerator[PlacementStep, None]:
        """Steps as the adverts tell them, until every peer has answered."""
        told: dict[StagePlan, PlacementStep] = {}
        while True:
            waiting = [task for task in running.values() if not task.done()]
            for stage, task in running.items():
                step = self._step(card, stage, task)
                if told.get(stage) != step:
                    told[stage] = step
                    yield step
            if not waiting:
                return
            await asyncio.wait(waiting, timeout=_PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)

    def _step(self, card: ModelCard, stage: StagePlan, task: "asyncio.Task[None]") -> PlacementStep:
        step = PlacementStep(peer=stage.peer, name=self.names(stage.peer), layers=stage.layers, state="loading", progress=0.0)
        if not task.done():
            held = self._holding(card.id, stage.peer, stage.layers)
            return step if held is None else msgspec.structs.replace(step, state=held.state, progress=held.progress)
        error = None if task.cancelled() else task.exception()
        if error is not None or task.cancelled():
            return msgspec.structs.replace(step, state="failed", message=str(error or "cancelled"))
        return msgspec.structs.replace(step, state="active", progress=1.0)

    def _holding(self, model: ModelId, peer: PeerId, layers: LayerRange) -> Holding | None:
        held = (
            holding
            for advert in self.adverts()
            if advert.peer == peer
            for holding in advert.holdings
            if holding.model == model and holding.layers == layers
        )
        return next(held, None)
