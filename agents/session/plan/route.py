"""Makes plans over resident layers: for new requests, for sessions that lost their plan, and for moves.

Layers that no peer has are placed first.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from logging import ERROR, WARNING, getLogger

import msgspec

from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import plan_input_of
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.availability import covered
from meshd.agents.session.plan.candidates import Candidate, CandidateSearch, LayerShortage, PeerRules, candidate_search
from meshd.agents.session.plan.mirror_targets import active_holdings
from meshd.agents.session.plan.resume import RecoveryPlan, RecoveryRequest
from meshd.errors import DoesNotFit, InvalidRequest, MeshdError, NoPeer, NotReady, Overloaded, PeerFault, RemoteFailure
from meshd.numerics import is_promised
from meshd.planner.model.estimate import estimate
from meshd.planner.problem import PlanInput
from meshd.planner.search.plan import build_plan
from meshd.planner.search.solve import Solution, solve
from meshd.planner.session.pause import opening_s
from meshd.planner.session.reroute import reserve_all
from meshd.types import Advert, LayerRange, ModelCard, ModelId, Objective, PeerId, Plan, PlanId, StagePlan, ranges_of

log = getLogger(__name__)

_USUAL_ANSWER = 512
"""Longest answer for which the time per token is predicted."""
_REQUEST_WAIT_S = 20.0
"""How long a request waits for a placement before it fails with NotReady."""
_LOADING_WAIT_S = 600.0
"""How long a recovery waits for layers whose loading another peer has started."""
_POLL_S = 0.02
_LOOK_AGAIN_S = 0.5
"""How often a session that waits for layers looks whether it can continue without them."""
_LOADING = frozenset({"loading", "warm"})
"""States of a holding whose layers will be active soon."""
_WITH_LEAVING = PeerRules(leaving=True)
_OWN, _OWN_WITH_LEAVING = PeerRules(own_numerics=True), PeerRules(leaving=True, own_numerics=True)


@dataclass(slots=True)
class Router:
    """Makes plans for the sessions that this peer coordinates."""

    me: PeerId
    library: ModelLibrary
    placer: PlacementClient
    adverts: Callable[[], list[Advert]]
    """Returns the adverts of the live peers, including this peer."""
    suspects: Callable[[], list[Advert]] = list
    """Returns the adverts of peers that are silent but still linked. They are used only if there is no other plan."""
    _placing: dict[Hashable, asyncio.Task[None]] = field(default_factory=dict)
    """Running placements, by what they place."""
    _plans: int = 0

    async def plan_for(self, card: ModelCard, mesh: MeshOptions, *, prompt_tokens: int, max_tokens: int) -> Plan:
        """Make a plan over resident layers, with free KV for the whole answer. Place the model first if layers are not resident.

        Raises: InvalidRequest, NoPeer, DoesNotFit; NotReady if the placement takes longer than `_REQUEST_WAIT_S` (it continues);
        Overloaded while other answers take all KV.
        """
        context = prompt_tokens + max_tokens
        try:
            return self.route(card, mesh, context, prompt_tokens)
        except (NotReady, DoesNotFit):
            plan = self._route_over_fragments(card, mesh, prompt_tokens, max_tokens)
            if plan is not None:
                return plan
            await self._place(card, mesh, context)
        return self.route(card, mesh, context, prompt_tokens)

    def _route_over_fragments(self, card: ModelCard, mesh: MeshOptions, prompt_tokens: int, max_tokens: int) -> Plan | None:
        """Make a plan in which a peer may run several stages, over holdings that are not adjacent.

        Such a plan is ready sooner than a new placement of the model.

        Returns: None if the request forbids such a plan, or there is none.
        """
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
        ids = {advert.capability.numerics for advert in self.adverts() if active_holdings(advert, card.id)}
        for only in (*sorted(ids, key=lambda numerics: (not is_promised(numerics), numerics)), None) if len(ids) > 1 else (None,):
            found = self._resident(card, mesh, request, PeerRules(leaving=True, only=only))
            if found is not None:
                return found.plan
        return None

    async def recover(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan:
        """Find the cheapest plan under which a session can continue. Load missing layers first if there is none.

        A plan in which each layer keeps its numerics comes first, even if another one is cheaper: it gives the same tokens. Of the
        options in `mesh`, only `peers` applies.

        Raises: DoesNotFit, NoPeer; NotReady while lost layers are being loaded; Overloaded while other sessions take the KV.
        """
        for rules in (_OWN, _OWN_WITH_LEAVING, PeerRules(), _WITH_LEAVING):
            found = self._resident(card, mesh, request, rules)
            if found is not None:
                return found
        try:
            found = await self._load_or_find(card, mesh, request)
            if found is None:
                raise _shortage_error(card, request, self._search(card, mesh, request, _WITH_LEAVING).shortage())
        except (DoesNotFit, NoPeer, Overloaded, PeerFault) as error:
            found = self._last_resort(card, mesh, request)
            if found is None:
                raise self._with_missing_peers(error, request) from error
        return found

    def better(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan | None:
        """Find a plan that is worth moving a running session to, with the same numerics for each layer.

        Returns: None if there is no such plan, or if the request names its stages or an objective other than latency.
        """
        if mesh.stages is not None or mesh.objective not in (None, Objective.LATENCY):
            return None
        try:
            search = self._search(card, mesh, request, PeerRules(standby=False, own_numerics=True))
        except NoPeer:
            return None
        found = search.better(mesh.min_peers or 1)
        return None if found is None else self._recovery(search, found)

    def with_target(self, card: ModelCard, plan: Plan, target: PeerId, source: PeerId | None) -> Plan:
        """Returns: the plan with the stages at `source` moved to `target`. `source` None: all stages.

        Raises: InvalidRequest if no stage would move, or the target does not hold the layers; NoPeer if the target is not in the
        cluster, is about to leave, or has too little free KV.
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
            numerics=problem.numerics(stages),
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
        holdings = profile.usable_holdings
        absent = [stage.layers for stage in moving if not any(stage.layers in holding.layers for holding in holdings)]
        if absent:
            text = f"{name} does not hold layers {_joined(absent)} of {problem.card.name}"
            raise InvalidRequest(text, param="target", hint="place them there first")
        moved = [StagePlan(peer=target, layers=stage.layers) for stage in moving if stage.mirror != target]
        if reserve_all(problem, moved) is None:
            raise NoPeer(f"{name} has no KV free for {problem.context} tokens", hint="try again when other sessions have ended")

    def answerable(self) -> list[ModelCard]:
        """Returns: the models whose layers are all active on live peers, but for those whose text could not be read."""
        adverts = self.adverts()
        cards = self.library.cards().values()
        return [card for card in cards if covered(card, adverts) and self.library.readable(card.id)]

    def covered(self, card: ModelCard) -> bool:
        """Whether the live peers together hold all layers of a model."""
        return covered(card, self.adverts())

    async def close(self) -> None:
        """Cancel the placements that requests have started."""
        tasks = list(self._placing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def route(self, card: ModelCard, mesh: MeshOptions, context: int, prompt_tokens: int) -> Plan:
        """Make a plan over resident layers, with standby copies and leaving peers only if there is no plan without them.

        Raises: as `solve`.
        """
        adverts = self.adverts()
        failure: MeshdError | None = None
        for standby, leaving in _routing_options(card.id, adverts):
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
                return self._new_plan(problem, solve(problem))
            except (NotReady, NoPeer) as error:
                failure = error
        assert failure is not None
        raise failure

    def _new_plan(self, problem: PlanInput, solution: Solution) -> Plan:
        """Make the plan of a new session.

        Its first token takes the opening of the stages besides. Its time per token is predicted for an answer of at most
        `_USUAL_ANSWER` tokens, since few answers fill the context that is reserved for them.
        """
        plan = build_plan(self._next_id(), problem, solution)
        opening = opening_s(problem, solution.stages, self.me)
        usual = msgspec.structs.replace(problem, context=min(problem.context, problem.prompt_tokens + _USUAL_ANSWER))
        return msgspec.structs.replace(
            plan,
            predicted_ttft_s=plan.predicted_ttft_s + opening,
            predicted_tpot_s=estimate(usual, solution.stages).tpot_s,
        )

    async def _place(self, card: ModelCard, mesh: MeshOptions, context: int) -> None:
        """Place the model for this request. Raises: as `_place_once`."""
        what = f"{card.name} is being loaded"
        await self._place_once(card, (card.id, mesh), what, lambda: self._place_model(card, mesh, context))

    async def _place_model(self, card: ModelCard, mesh: MeshOptions, context: int, avoid: Collection[PeerId] = ()) -> None:
        async for _ in self.placer.place(card, mesh, context=context, avoid=avoid):
            pass

    def _search(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest, rules: PeerRules) -> CandidateSearch:
        """Begin a search over the live peers. Raises: NoPeer."""
        return candidate_search(card, self.adverts(), mesh, request, self.me, rules)

    def _resident(
        self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest, rules: PeerRules, silent: Sequence[Advert] = ()
    ) -> RecoveryPlan | None:
        """Find the cheapest plan over the resident layers of the live peers and of the `silent` ones.

        Returns: None if there is no such plan.
        """
        try:
            search = candidate_search(card, [*self.adverts(), *silent], mesh, request, self.me, rules)
        except NoPeer:
            return None
        found = search.best()
        return None if found is None else self._recovery(search, found)

    def _last_resort(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan | None:
        """Find the cheapest plan that may also use silent peers and peers to avoid. Returns: None if there is none."""
        silent = self.suspects()
        request = replace(request, avoid=request.avoid.union(advert.peer for advert in silent))
        for own in (True, False):
            found = self._resident(card, mesh, request, PeerRules(leaving=True, avoided=True, own_numerics=own), silent)
            if found is not None:
                return found
        return None

    def _recovery(self, search: CandidateSearch, found: Candidate) -> RecoveryPlan:
        solution = Solution(
            stages=found.stages,
            estimate=found.estimate,
            objective=Objective.LATENCY,
            method="given",
            numerics=search.problem.numerics(found.stages),
        )
        return RecoveryPlan(build_plan(self._next_id(), search.problem, solution), found.method, found.pause_s)

    def _next_id(self) -> PlanId:
        self._plans += 1
        return PlanId(f"{self.me[:8]}-{self._plans}")

    async def _load_or_find(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> RecoveryPlan | None:
        """Load missing layers, and find a plan with them, or one without them before: a lost peer may come back sooner.

        Returns: None if there is no plan although the layers are loaded. Raises: as `recover`. Cancel: the load continues.
        """
        loading = asyncio.ensure_future(self._load_missing(card, mesh, request))
        found = None
        try:
            while found is None and not loading.done():
                await asyncio.wait([loading], timeout=_LOOK_AGAIN_S)
                found = self._resident(card, mesh, request, _WITH_LEAVING)
            if found is None:
                loading.result()
            return found
        finally:
            if not loading.cancel() and not loading.cancelled():
                loading.exception()  # marks it as seen: perhaps a plan was found without the load

    async def _load_missing(self, card: ModelCard, mesh: MeshOptions, request: RecoveryRequest) -> None:
        """Load the layers that the session needs and no peer has."""
        search = self._search(card, mesh, request, _WITH_LEAVING)
        shortage = search.shortage()
        if shortage.busy or not shortage.missing:
            raise _shortage_error(card, request, shortage)
        key = card.id, shortage.missing, request.context, request.avoid, mesh.peers
        what = f"layers {_joined(shortage.missing)} of {card.name} are being loaded"
        await self._place_once(card, key, what, lambda: self._load(search, shortage.missing))

    async def _load(self, search: CandidateSearch, missing: tuple[LayerRange, ...]) -> None:
        """Load missing layers, and wait for those whose loading another peer has started."""
        card, request, among = search.problem.card, search.request, search.problem.peers
        loading = self._loading(card.id, request)
        layers = sorted({layer for run in missing for layer in run} - loading)
        if layers:
            totals = [holding.kv_tokens_total for advert in self.adverts() for holding in active_holdings(advert, card.id)]
            kv_tokens = max(request.context, min(totals, default=request.context))
            try:
                await self.placer.repair(
                    card, ranges_of(layers), kv_tokens=kv_tokens, least_tokens=request.context, avoid=request.avoid, among=among
                )
            except DoesNotFit:
                allowed = None if among is None else tuple(peer for peer in among if peer not in request.avoid)
                if search.surviving or allowed == ():
                    raise
                # Not on a peer to avoid: the plan could not use it, and the session would ask for the same again and again.
                await self._place_model(card, MeshOptions(peers=allowed), request.context, request.avoid)
        clock = self.placer.clock
        until = clock.monotonic() + _LOADING_WAIT_S
        while clock.monotonic() < until and not loading.isdisjoint(self._loading(card.id, request)):
            await clock.sleep(_POLL_S)

    def _loading(self, model: ModelId, request: RecoveryRequest) -> set[int]:
        """Returns: layers that are being loaded, with enough KV for the request, on peers that may be used."""
        return {
            layer
            for advert in self.adverts()
            if not advert.draining and advert.peer not in request.avoid
            for holding in advert.holdings
            if holding.model == model and holding.state in _LOADING and holding.kv_tokens_total >= request.context
            for layer in holding.layers
        }

    def _with_missing_peers(self, error: MeshdError, request: RecoveryRequest) -> MeshdError:
        """Returns: the error with the names of the lost and the avoided peers in its message."""
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

    async def _place_once(self, card: ModelCard, key: Hashable, what: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Run a placement, or join the running one with the same key. Cancelling a request does not stop the placement.

        Raises: NotReady if the placement takes longer than `_REQUEST_WAIT_S`; the placement's own error if it fails in time.
        """
        task = self._placing.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(work(), name=what)
            self._placing[key] = task
            task.add_done_callback(lambda done: self._placement_ended(key, done))
        done, _ = await asyncio.wait([task], timeout=_REQUEST_WAIT_S)
        if not done:
            raise NotReady(what, progress=self.placer.progress(card.id), retry_after_s=5.0)
        task.result()

    def _placement_ended(self, key: Hashable, task: asyncio.Task[None]) -> None:
        self._placing.pop(key, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.log(WARNING if isinstance(error, MeshdError) else ERROR, "the placement of layers for a request failed: %s", error)


def _routing_options(model: ModelId, adverts: list[Advert]) -> Iterator[tuple[bool, bool]]:
    """Yield (use standby copies, use peers that are about to leave), from the narrowest choice of peers to the widest."""
    yield False, False
    if any(holding.standby for advert in adverts for holding in active_holdings(advert, model)):
        yield True, False
    if any(advert.draining for advert in adverts):
        yield True, True


def _shortage_error(card: ModelCard, request: RecoveryRequest, shortage: LayerShortage) -> MeshdError:
    if shortage.busy:
        return Overloaded(f"layers {_joined(shortage.busy)} of {card.name} have no KV free for {request.context} tokens now")
    if shortage.missing:
        return NotReady(f"layers {_joined(shortage.missing)} of {card.name} are not loaded on any live peer")
    return Overloaded(f"the live peers have no KV free for {request.context} tokens of {card.name} in all stages at once")


def _joined(runs: Sequence[LayerRange]) -> str:
    return ", ".join(map(str, runs))
