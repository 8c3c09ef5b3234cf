"""From a request to a plan: a route over what lies on the peers now. What is not placed yet is placed first."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.library import Library
from meshd.agents.placer import Placer
from meshd.agents.questions import problem_of
from meshd.agents.service import MeshOptions
from meshd.errors import DoesNotFit, MeshdError, NotReady
from meshd.planner.plan import build_plan
from meshd.planner.solve import solve
from meshd.types import Advert, ModelCard, ModelId, PeerId, Plan, PlanId

log = getLogger(__name__)

_REQUEST_WAIT_S = 20.0
"""How long a request waits for a placement before it is told to come back."""


@dataclass(slots=True)
class Router:
    """Makes plans for requests on this peer."""

    me: PeerId
    library: Library
    placer: Placer
    adverts: Callable[[], list[Advert]]
    """Of the live peers, this one's too."""
    _placing: dict[tuple[ModelId, MeshOptions], asyncio.Task[None]] = field(default_factory=dict)
    _plans: int = 0

    async def plan_for(self, card: ModelCard, mesh: MeshOptions, *, prompt_tokens: int, max_tokens: int) -> Plan:
        """A plan over resident layers, with KV room for the whole answer.

        Raises: InvalidRequest, NoPeer, DoesNotFit; NotReady while a placement that it started goes on; Overloaded while other
        answers take all KV.
        """
        context = prompt_tokens + max_tokens
        try:
            return self._route(card, mesh, context, prompt_tokens)
        except (NotReady, DoesNotFit):
            await self._place(card, mesh, context)
        return self._route(card, mesh, context, prompt_tokens)

    def answerable(self) -> list[ModelCard]:
        """Models all of whose layers are active on live peers."""
        return [card for card in self.library.cards().values() if self.covered(card)]

    def covered(self, card: ModelCard) -> bool:
        """Whether live peers hold all layers of a model between them."""
        reached = 0
        for layers in sorted(
            held.layers for advert in self.adverts() for held in advert.holdings if held.model == card.id and held.state == "active"
        ):
            if layers.start <= reached:
                reached = max(reached, layers.end)
        return reached == card.spec.layers

    def _route(self, card: ModelCard, mesh: MeshOptions, context: int, prompt_tokens: int) -> Plan:
        problem = problem_of(card, self.adverts(), mesh, context=context, prompt_tokens=prompt_tokens, resident_only=True)
        solution = solve(problem)
        self._plans += 1
        return build_plan(PlanId(f"{self.me[:8]}-{self._plans}"), problem, solution)

    async def _place(self, card: ModelCard, mesh: MeshOptions, context: int) -> None:
        """Place what this request needs. Requests that need the same share one placement, which outlives them."""
        key = (card.id, mesh)
        task = self._placing.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._run(card, mesh, context), name=f"place {card.name}")
            self._placing[key] = task
            task.add_done_callback(lambda done: self._placed(key, done))
        done, _ = await asyncio.wait([task], timeout=_REQUEST_WAIT_S)
        if not done:
            raise NotReady(f"{card.name} is being loaded", progress=self.placer.progress(card.id), retry_after_s=5.0)
        task.result()

    async def _run(self, card: ModelCard, mesh: MeshOptions, context: int) -> None:
        async for _ in self.placer.place(card, mesh, context=context):
            pass

    def _placed(self, key: tuple[ModelId, MeshOptions], task: asyncio.Task[None]) -> None:
        self._placing.pop(key, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.log(30 if isinstance(error, MeshdError) else 40, "placing for a request failed: %s", error)

    async def close(self) -> None:
        """End the placements that requests began."""
        tasks = list(self._placing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
