"""Plans for requests, and for sessions that lost theirs, over the layers that peers have now. Missing layers are placed first."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger

import msgspec

from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import plan_input_of
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.candidates import Candidate, CandidateSearch, LayerShortage, PeerRules, candidate_search
from meshd.agents.session.plan.resume import RecoveryPlan, RecoveryRequest
from meshd.errors import DoesNotFit, InvalidRequest, MeshdError, NoPeer, NotReady, Overloaded, PeerFault, RemoteFailure
from meshd.planner.model.estimate import estimate
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import USABLE_STATE
from meshd.planner.search.plan import build_plan
from meshd.planner.search.solve import Solution, solve
from meshd.planner.session.reroute import reserve_all, reserve_in
from meshd.types import Advert, Holding, LayerRange, ModelCard, ModelId, Objective, PeerId, Plan, PlanId, StagePlan, ranges_of

log = getLogger(__name__)

_REQUEST_WAIT_S = 20.0
"""How long a request waits for a placement before it is told to come back."""
_COMING_S = 600.0
"""How long layers that others asked for are waited for."""
_POLL_S = 0.02
_COMING = frozenset({"loading", "warm"})
_ANYONE = PeerRules(leaving=True)
_MIRROR_BYTES = 1 << 20
"""Of KV, to compare links by."""


@dataclass(slots=True)
class Router:
    """Makes plans for requests on this peer."""

    me: PeerId
    library: ModelLibrary
    placer: PlacementClient
    adverts: Callable[[], list[Advert]]
    """Of the live peers, this one's too."""
    suspects: Callable[[], list[Advert]] = list
    """Of peers that are silent while their link stands: used when there is no other way."""
    _placing: dict[Hashable, asyncio.Task[None]] = field(default_factory=dict)
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
            plan = self._from_pieces(card, mesh, prompt_tokens, max_tokens)
            if plan is not None:
                return plan
            await self._place(card, mesh, context)
        return self._route(card, mesh, context, prompt_tokens)

    def _from_pieces(self, card: ModelCard, mesh: MeshOptions, prompt_tokens: int, max_tokens: int) -> Plan | None:
        """A plan in which a peer may run several stages, from loads that don't touch: quicker than placing, where it is allowed."""
        if mesh.stages is not None or (mesh.min_peers or 1) > 1:
            return None
        request = RecoveryRequest(
            old=None,
            lost=frozenset(),
            avoid=frozenset(),
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            known=prompt_tokens,
        )
        found = self._resident(card, mesh, request, _ANYONE)
        return None if found is None else found.plan

    async def recover(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan:
        """The cheapest way to go on with a session: over what is resident; else over what is loaded for it.

        Of the request's wishes only `peers` still counts. Raises: DoesNotFit, NoPeer; NotReady while lost layers are being loaded;
        Overloaded while other sessions take the KV.
        """
        found = self._resident(card, mesh, request, PeerRules()) or self._resident(card, mesh, request, _ANYONE)
        if found is not None:
            return found
        try:
            await self._load_missing(card, mesh, request)
            found = self._resident(card, mesh, request, _ANYONE)
            if found is None:
                raise _shortage_error(card, request, self._search(card, mesh, request, _ANYONE).shortage())
        except (DoesNotFit, NoPeer, Overloaded, PeerFault) as error:
            found = self._last_resort(card, mesh, request)
            if found is None:
                raise self._explained(error, request) from error
        return found

    def better(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan | None:
        """For a session that runs: a plan that is worth the move, if there is one. A request that named its stages keeps them."""
        if mesh.stages is not None or mesh.objective not in (None, Objective.LATENCY):
            return None
        try:
            search = self._search(card, mesh, request, PeerRules(standby=False))
        except NoPeer:
            return None
        found = search.better(mesh.min_peers or 1)
        return None if found is None else self._recovery(search, found)

    def with_target(self, card: ModelCard, plan: Plan, target: PeerId, source: PeerId | None) -> Plan:
        """The plan with all its stages at `source` (None: wherever they are) at `target`.

        Raises: InvalidRequest when there is nothing to move, or the target does not hold these layers; NoPeer when it is not here,
        about to leave, or has no room.
        """
        moving = [stage for stage in plan.stages if stage.peer != target and source in (None, stage.peer)]
        problem = plan_input_of(card, self.adverts(), MeshOptions(), context=plan.context, resident_only=True, leaving=True)
        self._check_target(problem, moving, target, source)
        stages = tuple(StagePlan(peer=target if stage in moving else stage.peer, layers=stage.layers) for stage in plan.stages)
        predicted = estimate(problem, stages)
        return msgspec.structs.replace(
            plan,
            id=self._next_id(),
            stages=stages,
            predicted_ttft_s=max(plan.predicted_ttft_s, predicted.ttft_s),
            predicted_tpot_s=predicted.tpot_s,
        )

    def _check_target(self, problem: PlanInput, moving: list[StagePlan], target: PeerId, source: PeerId | None) -> None:
        name = self.placer.names(target)
        if not moving:
            where = f"at {self.placer.names(source)}" if source not in (None, target) else f"that is not at {name}"
            raise InvalidRequest(f"nothing to move: the session has no stage {where}", param="target")
        if any(advert.peer == target and advert.draining for advert in self.adverts()):
            raise NoPeer(f"{name} is about to leave and takes no new work")
        profile = problem.profile(target)
        absent = [stage.layers for stage in moving if not any(stage.layers in held.layers for held in profile.usable_holdings)]
        if absent:
            text = f"{name} does not hold layers {_listed(absent)} of {problem.card.name}"
            raise InvalidRequest(text, param="target", hint="place them there first")
        moved = [StagePlan(peer=target, layers=stage.layers) for stage in moving if stage.mirror != target]
        if reserve_all(problem, moved) is None:
            raise NoPeer(f"{name} has no KV free for {problem.context} tokens", hint="try again when other sessions have ended")

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

    async def close(self) -> None:
        """End the placements that requests began."""
        tasks = list(self._placing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _route(self, card: ModelCard, mesh: MeshOptions, context: int, prompt_tokens: int) -> Plan:
        """Over what is there to be routed over; else over standby copies too; else over peers that are about to leave too.

        Raises: as `solve`, for the last of these.
        """
        adverts = self.adverts()
        failure: MeshdError | None = None
        for standby, leaving in _widening(card.id, adverts):
            try:
                problem = plan_input_of(
                    card,
                    adverts,
                    mesh,
                    context=context,
                    prompt_tokens=prompt_tokens,
                    resident_only=True,
                    standby=standby,
                    leaving=leaving,
                )
                return build_plan(self._next_id(), problem, solve(problem))
            except (NotReady, NoPeer) as error:
                failure = error
        assert failure is not None
        raise failure

    async def _place(self, card: ModelCard, mesh: MeshOptions, context: int) -> None:
        """Place what this request needs."""
        await self._shared(card, (card.id, mesh), f"{card.name} is being loaded", lambda: self._placed_whole(card, mesh, context))

    async def _placed_whole(self, card: ModelCard, mesh: MeshOptions, context: int) -> None:
        async for _ in self.placer.place(card, mesh, context=context):
            pass

    def _search(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest, allowed: PeerRules) -> CandidateSearch:
        """Raises: NoPeer."""
        return candidate_search(card, self.adverts(), mesh, request, self.me, allowed)

    def _resident(
        self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest, allowed: PeerRules, silent: Sequence[Advert] = ()
    ) -> RecoveryPlan | None:
        """Over what is there; over peers that are `silent` just now too."""
        try:
            search = candidate_search(card, [*self.adverts(), *silent], mesh, request, self.me, allowed)
        except NoPeer:
            return None
        found = search.best()
        return None if found is None else self._recovery(search, found)

    def _last_resort(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan | None:
        """Over peers that are to be avoided too, and those that are silent just now."""
        silent = self.suspects()
        request = replace(request, avoid=request.avoid.union(advert.peer for advert in silent))
        return self._resident(card, mesh, request, PeerRules(leaving=True, avoided=True), silent)

    def _recovery(self, search: CandidateSearch, found: Candidate) -> RecoveryPlan:
        solution = Solution(stages=found.stages, estimate=found.estimate, objective=Objective.LATENCY, method="given")
        return RecoveryPlan(build_plan(self._next_id(), search.problem, solution), found.method, found.pause_s)

    def _next_id(self) -> PlanId:
        self._plans += 1
        return PlanId(f"{self.me[:8]}-{self._plans}")

    async def _load_missing(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> None:
        """Load the layers that the session needs and no peer has."""
        search = self._search(card, mesh, request, _ANYONE)
        shortage = search.shortage()
        if shortage.busy or not shortage.missing:
            raise _shortage_error(card, request, shortage)
        key = card.id, shortage.missing, request.context, request.avoid, mesh.peers
        what = f"layers {_listed(shortage.missing)} of {card.name} are being loaded"
        await self._shared(card, key, what, lambda: self._load(search, shortage.missing))

    async def _load(self, search: CandidateSearch, missing: tuple[LayerRange, ...]) -> None:
        """What others have begun to load is waited for, the rest is asked for."""
        card, request, among = search.problem.card, search.request, search.problem.peers
        coming = self._coming(card.id, request)
        layers = sorted({layer for run in missing for layer in run} - coming)
        if layers:
            totals = [held.kv_tokens_total for advert in self.adverts() for held in _active(advert, card.id)]
            wanted = max(request.context, min(totals, default=request.context))
            try:
                await self.placer.repair(
                    card, ranges_of(layers), kv_tokens=wanted, least_tokens=request.context, avoid=request.avoid, among=among
                )
            except DoesNotFit:
                if search.surviving:
                    raise
                await self._placed_whole(card, MeshOptions(peers=among), request.context)
        clock = self.placer.clock
        until = clock.monotonic() + _COMING_S
        while clock.monotonic() < until and not coming.isdisjoint(self._coming(card.id, request)):
            await clock.sleep(_POLL_S)

    def _coming(self, model: ModelId, request: RecoveryRequest) -> set[int]:
        """Layers that are being loaded, with enough KV, on peers that may be used."""
        return {
            layer
            for advert in self.adverts()
            if not advert.draining and advert.peer not in request.avoid
            for held in advert.holdings
            if held.model == model and held.state in _COMING and held.kv_tokens_total >= request.context
            for layer in held.layers
        }

    def _explained(self, error: MeshdError, request: RecoveryRequest) -> MeshdError:
        """The error with who is missing."""
        gone = {"lost": request.lost, "avoided": request.avoid - request.lost}
        names = [f"{what}: {', '.join(sorted(map(self.placer.names, peers)))}" for what, peers in gone.items() if peers]
        text = f"{error.message} ({'; '.join(names)})" if names else error.message
        match error:
            case Overloaded():
                return Overloaded(text, hint=error.hint, retry_after_s=error.retry_after_s)
            case NoPeer():
                return NoPeer(text, hint=error.hint)
            case DoesNotFit():
                return DoesNotFit(text, missing_bytes=error.missing_bytes, hint=error.hint)
            case RemoteFailure():
                return DoesNotFit(f"lost layers could not be loaded: {text}", hint=error.hint)
        return NotReady(f"lost layers could not be loaded yet: {text}")

    async def _shared(self, card: ModelCard, key: Hashable, what: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Requests that need the same share one placement, which outlives them. Raises: NotReady if it takes long; as it does."""
        task = self._placing.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(work(), name=what)
            self._placing[key] = task
            task.add_done_callback(lambda done: self._placed(key, done))
        done, _ = await asyncio.wait([task], timeout=_REQUEST_WAIT_S)
        if not done:
            raise NotReady(what, progress=self.placer.progress(card.id), retry_after_s=5.0)
        task.result()

    def _placed(self, key: Hashable, task: asyncio.Task[None]) -> None:
        self._placing.pop(key, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.log(30 if isinstance(error, MeshdError) else 40, "placing for a request failed: %s", error)


def mirror_targets(plan: Plan, adverts: list[Advert]) -> Plan:
    """The plan with a mirror for each stage whose layers lie on another live peer too, with room for its KV.

    Peers with no stage of the plan first, then those that KV reaches soonest, then those with the most room.
    """
    network = Network.from_adverts(adverts)
    holdings_of = {advert.peer: _active(advert, plan.model) for advert in adverts if not advert.draining}
    for stage in plan.stages:
        _take(holdings_of, stage.peer, stage.layers, plan.context)
    stages = []
    for stage in plan.stages:
        fitting = [
            (
                peer in plan.peers,
                network.hop_s(stage.peer, peer, _MIRROR_BYTES),
                -sum(held.kv_tokens_free for held in holdings),
                peer,
            )
            for peer, holdings in holdings_of.items()
            if peer != stage.peer and reserve_in(holdings, stage.layers, plan.context) is not None
        ]
        mirror = min(fitting)[-1] if fitting else None
        if mirror is not None:
            _take(holdings_of, mirror, stage.layers, plan.context)
        stages.append(msgspec.structs.replace(stage, mirror=mirror))
    return msgspec.structs.replace(plan, stages=tuple(stages))


def _take(holdings_of: dict[PeerId, tuple[Holding, ...]], peer: PeerId, layers: LayerRange, tokens: int) -> None:
    left = reserve_in(holdings_of.get(peer, ()), layers, tokens)
    if left is not None:
        holdings_of[peer] = left


def _active(advert: Advert, model: ModelId) -> tuple[Holding, ...]:
    return tuple(held for held in advert.holdings if held.model == model and held.state == USABLE_STATE)


def _widening(model: ModelId, adverts: list[Advert]) -> Iterator[tuple[bool, bool]]:
    """(with standby copies, with peers that are about to leave): what to route over, as few as will do."""
    yield False, False
    if any(held.standby for advert in adverts for held in _active(advert, model)):
        yield True, False
    if any(advert.draining for advert in adverts):
        yield True, True


def _shortage_error(card: ModelCard, request: RecoveryRequest, shortage: LayerShortage) -> MeshdError:
    if shortage.busy:
        return Overloaded(f"layers {_listed(shortage.busy)} of {card.name} have no KV free for {request.context} tokens now")
    if shortage.missing:
        return NotReady(f"layers {_listed(shortage.missing)} of {card.name} lie on no live peer yet")
    return Overloaded(f"the live peers have no KV free for {request.context} tokens of {card.name} in all stages at a time")


def _listed(runs: Sequence[LayerRange]) -> str:
    return ", ".join(map(str, runs))
