"""A router and a coordinator that count their decisions, for the figures of a run."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from meshd.agents.service import MeshOptions
from meshd.agents.session.answer import Answer
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.plan.candidates import PeerRules
from meshd.agents.session.plan.resume import RecoveryPlan, RecoveryRequest
from meshd.agents.session.plan.route import Router
from meshd.agents.session.recovery_history import Recovered
from meshd.types import Advert, ModelCard, Plan

T = TypeVar("T")


class CountingRouter(Router):
    """Counts plans, recoveries and searches, and the real (not virtual) time that searches take."""

    plans = 0
    recoveries = 0
    searches = 0
    searching_s = 0.0

    def _timed(self, search: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return search()
        finally:
            self.searches += 1
            self.searching_s += time.perf_counter() - began

    def route(self, card: ModelCard, mesh: MeshOptions, context: int, prompt_tokens: int) -> Plan:
        search = super().route
        return self._timed(lambda: search(card, mesh, context, prompt_tokens))

    def _resident(
        self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest, allowed: PeerRules, silent: Sequence[Advert] = ()
    ) -> RecoveryPlan | None:
        search = super()._resident
        return self._timed(lambda: search(card, mesh, request, allowed, silent))

    async def plan_for(self, card: ModelCard, mesh: MeshOptions, *, prompt_tokens: int, max_tokens: int) -> Plan:
        self.plans += 1
        return await super().plan_for(card, mesh, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    async def recover(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan:
        self.recoveries += 1
        return await super().recover(card, mesh, request)

    def better(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan | None:
        self.recoveries += 1
        search = super().better
        return self._timed(lambda: search(card, mesh, request))


class CountingCoordinator(Coordinator):
    """Counts, for each method, the answers that continued by it after a change of plan, and the changes that followed a loss."""

    methods: Counter[str]

    def _on_recovered(self, answer: Answer, recovered: Recovered) -> None:
        self.methods[recovered.method] += 1
        self.methods["losses"] += recovered.cause == "loss" and recovered.reason != "resumed"
        super()._on_recovered(answer, recovered)
