"""Places models on request: gets stages from the planner, sends PLACE to the peer of each stage, and reports progress.

A user, `meshd up --model`, or a session that needs missing layers starts a placement; `keeper.py` maintains it.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

import msgspec

from meshd.agents.cluster_service import PlacementStep
from meshd.agents.links.links import Links
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import (
    CONTEXTS_OF_KV,
    LEAST_CONTEXT,
    ONE_NUMERICS_CONTEXT,
    USUAL_CONTEXT,
    plan_input_of,
    repair_input,
)
from meshd.agents.service import MeshOptions
from meshd.clock import Clock
from meshd.errors import DoesNotFit, MeshdError, NoPeer, OutOfMemory, PeerFault, ProtocolViolation, Unavailable
from meshd.models.cards import shown_to_peers
from meshd.numerics import UNKNOWN, NumericsId
from meshd.planner.model.memory import allowed_bytes, stage_memory
from meshd.planner.problem import PlanInput
from meshd.planner.search.repair import repair_within
from meshd.planner.search.solve import Solution, needs_mixing, solve
from meshd.protocol.messages import Place, Placed, Unplace, Unplaced
from meshd.types import Advert, Holding, LayerRange, ModelCard, ModelId, Objective, PeerId, StagePlan

_DEADLINE_S = 3600.0
"""Deadline of a PLACE request. It is long because the peer may have to download the weights over a slow connection."""
UNPLACE_S = 10.0
"""Longest time that a peer may take to answer UNPLACE."""
_PROGRESS_S = 0.2
_ADVERTISED_S = 5.0
_REPAIR_TRIES = 3
"""How many times a repair chooses peers, if some of the chosen peers can't load their layers."""


@dataclass(slots=True)
class PlacementClient:
    """Places models from this peer. Any peer can place a model on any peers."""

    links: Links
    library: ModelLibrary
    adverts: Callable[[], list[Advert]]
    names: Callable[[PeerId], str]
    clock: Clock

    async def place(
        self, card: ModelCard, mesh: MeshOptions, *, context: int | None = None, avoid: Collection[PeerId] = ()
    ) -> AsyncGenerator[PlacementStep, None]:
        """Load the model on the peers that the planner, or `mesh.stages`, chooses, but on none in `avoid`.

        Yields each peer's progress when it changes.

        KV is reserved for contexts of `USUAL_CONTEXT` tokens, or of the model's maximum if that is smaller. If memory is short, it
        is reserved for fewer tokens, but never for fewer than `context` or `LEAST_CONTEXT`.

        Raises: InvalidRequest, NoPeer, DoesNotFit, ModelFileError if the model's text can't be used, and the error of a peer that
        could not load its layers.
        Cancel: peers that have begun to load their layers finish the load.
        """
        problem, solution = self._solve(card, mesh, context, avoid)
        await self._check_text(card)
        loop = asyncio.get_running_loop()
        kv_tokens = {stage: self._kv_tokens(problem, stage) for stage in solution.stages}
        pinned = _is_pinned(mesh)
        running = {stage: loop.create_task(self._ask(card, stage, tokens, pinned=pinned)) for stage, tokens in kv_tokens.items()}
        try:
            async with aclosing(self._watch(card, running)) as steps:
                async for step in steps:
                    yield step
            await self._advertised(card.id, {stage: task.result() for stage, task in running.items()})
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _check_text(self, card: ModelCard) -> None:
        """Read the model's tokenizer and template, without which it can't answer. Raises: ModelFileError if they can't be used."""
        with suppress(NoPeer, PeerFault, Unavailable):  # then nobody can send its header now; a request will find out
            await self.library.text(card)

    async def repair(
        self,
        card: ModelCard,
        missing: Sequence[LayerRange],
        *,
        kv_tokens: int,
        least_tokens: int | None = None,
        avoid: Collection[PeerId] = (),
        among: Collection[PeerId] | None = None,
    ) -> tuple[StagePlan, ...]:
        """Load missing layers, and keep the layers that are loaded. A peer that can't load its layers is replaced by another peer.

        KV is reserved for `kv_tokens` tokens. If memory is short, this number is halved repeatedly, down to `least_tokens` (None:
        not at all). Uses only peers in `among` (None: any) that are not in `avoid` and not draining.

        Returns: the stages that were loaded, in the order of their layers.
        Raises: NoPeer, DoesNotFit, and the error of a peer that could not load its layers.
        Cancel: peers that have begun to load their layers finish the load.
        """
        excluded, waiting = set(avoid), tuple(missing)
        placed: list[StagePlan] = []
        failure: MeshdError | None = None
        for _ in range(_REPAIR_TRIES):
            problem = repair_input(card, self.adverts(), avoid=excluded, among=among)
            # On a thread: with many peers the search would delay heartbeats for too long.
            stages, tokens = await asyncio.to_thread(
                _choose_stages, problem, waiting, kv_tokens, least_tokens or kv_tokens, failure
            )
            asks = (self._ask(card, stage, tokens) for stage in stages)
            results = dict(zip(stages, await asyncio.gather(*asks, return_exceptions=True), strict=True))
            granted = {stage: result for stage, result in results.items() if isinstance(result, int)}
            await self._advertised(card.id, granted)
            loaded = [stage for stage in stages if granted.get(stage, 0) >= tokens]
            placed += loaded
            waiting = tuple(stage.layers for stage in stages if stage not in loaded)
            if not waiting:
                return tuple(sorted(placed, key=lambda stage: stage.layers))
            failure = _failure_of(results, tokens)
            excluded |= {stage.peer for stage in stages if stage not in loaded}
        assert failure is not None
        raise failure

    async def _advertised(self, model: ModelId, stages: Mapping[StagePlan, int]) -> None:
        """Wait until the adverts show the stages as active, because routes are planned from adverts.

        Returns after `_ADVERTISED_S` at the latest. `stages` maps each stage to the number of tokens that it has KV for.
        """
        until = self.clock.monotonic() + _ADVERTISED_S
        while self.clock.monotonic() < until and not all(self._active(model, stage, kv) for stage, kv in stages.items()):
            await self.clock.sleep(_PROGRESS_S / 10)

    def _active(self, model: ModelId, stage: StagePlan, kv_tokens: int) -> bool:
        return any(
            holding.model == model
            and holding.state == "active"
            and stage.layers in holding.layers
            and holding.kv_tokens_total >= kv_tokens
            for advert in self.adverts()
            if advert.peer == stage.peer
            for holding in advert.holdings
        )

    async def unplace(self, model: ModelId) -> int:
        """Unload a model on every live peer. Peers without it are told too, so that none of them takes this for a loss.

        Returns: bytes that are freed now, or when sessions end. Raises: PeerFault if a peer that has it does not unload it.
        """
        adverts = self.adverts()
        replies = await asyncio.gather(
            *(request_unplace(self.links, advert.peer, model) for advert in adverts), return_exceptions=True
        )
        freed = 0
        for advert, reply in zip(adverts, replies, strict=True):
            if isinstance(reply, int):
                freed += reply
            elif any(holding.model == model for holding in advert.holdings) or not isinstance(reply, MeshdError):
                raise reply
        return freed

    def progress(self, model: ModelId) -> float:
        """Returns: the progress, 0 to 1, of the peer that is slowest to load its layers of this model; 1 if no peer has any."""
        return min(
            (holding.progress for advert in self.adverts() for holding in advert.holdings if holding.model == model), default=1.0
        )

    def _solve(
        self, card: ModelCard, mesh: MeshOptions, context: int | None, avoid: Collection[PeerId]
    ) -> tuple[PlanInput, Solution]:
        """Search for a placement. If it doesn't fit, halve the context, but not below `context` or `LEAST_CONTEXT`.

        The context is also halved where only a placement over several numerics fits, but not below `ONE_NUMERICS_CONTEXT`.
        """
        tokens = max(context or 0, min(card.spec.context_length, USUAL_CONTEXT))
        adverts = [advert for advert in self.adverts() if advert.peer not in avoid]
        mixed: tuple[PlanInput, Solution] | None = None
        while True:
            problem = plan_input_of(card, adverts, mesh, context=tokens)
            smaller = max(context or 0, tokens // 2)
            try:
                found = problem, solve(problem)
                if not needs_mixing(*found):
                    return found
                mixed = mixed or found
                if smaller < ONE_NUMERICS_CONTEXT or smaller == tokens:
                    return mixed
            except DoesNotFit:
                if smaller < LEAST_CONTEXT or smaller == tokens:
                    raise
            tokens = smaller

    def _kv_tokens(self, problem: PlanInput, stage: StagePlan) -> int:
        """Choose how many tokens to reserve KV for: up to `CONTEXTS_OF_KV` whole contexts, as far as the peer has memory."""
        profile = problem.profile(stage.peer)
        assert profile is not None
        used = stage_memory(problem, stage)
        spare = allowed_bytes(problem, profile) - used.total_bytes
        more = int(spare // max(1, used.kv_bytes))
        return problem.context * (1 + max(0, min(CONTEXTS_OF_KV - 1, more)))

    async def _ask(self, card: ModelCard, stage: StagePlan, kv_tokens: int, *, pinned: bool = False) -> int:
        numerics = numerics_of_peer(self.adverts(), stage.peer)
        return await request_place(self.links, stage.peer, card, stage.layers, kv_tokens, numerics, pinned=pinned)

    async def _watch(self, card: ModelCard, running: dict[StagePlan, "asyncio.Task[int]"]) -> AsyncGenerator[PlacementStep, None]:
        """Yield each stage's progress when it changes in the adverts, until every peer has answered PLACE."""
        latest: dict[StagePlan, PlacementStep] = {}
        while True:
            waiting = [task for task in running.values() if not task.done()]
            for stage, task in running.items():
                step = self._step(card, stage, task)
                if latest.get(stage) != step:
                    latest[stage] = step
                    yield step
            if not waiting:
                return
            await asyncio.wait(waiting, timeout=_PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)

    def _step(self, card: ModelCard, stage: StagePlan, task: "asyncio.Task[int]") -> PlacementStep:
        step = PlacementStep(peer=stage.peer, name=self.names(stage.peer), layers=stage.layers, state="loading", progress=0.0)
        if not task.done():
            holding = self._holding(card.id, stage.peer, stage.layers)
            return step if holding is None else msgspec.structs.replace(step, state=holding.state, progress=holding.progress)
        error = None if task.cancelled() else task.exception()
        if error is not None or task.cancelled():
            return msgspec.structs.replace(step, state="failed", message=str(error or "cancelled"))
        return msgspec.structs.replace(step, state="active", progress=1.0)

    def _holding(self, model: ModelId, peer: PeerId, layers: LayerRange) -> Holding | None:
        found = (
            holding
            for advert in self.adverts()
            if advert.peer == peer
            for holding in advert.holdings
            if holding.model == model and holding.layers == layers
        )
        return next(found, None)


async def request_unplace(links: Links, peer: PeerId, model: ModelId) -> int:
    """Ask a peer to unload a model. Returns: bytes that are freed now, or when sessions end. Raises: PeerFault."""
    reply, _ = await links.request(peer, Unplace(request=links.next_request(), model=model), timeout_s=UNPLACE_S)
    return reply.freed_bytes if isinstance(reply, Unplaced) else 0


def numerics_of_peer(adverts: Sequence[Advert], peer: PeerId) -> NumericsId:
    """Return the id that a peer advertises; `UNKNOWN` if it is not in the cluster now."""
    return next((advert.capability.numerics for advert in adverts if advert.peer == peer), UNKNOWN)


async def request_place(
    links: Links,
    peer: PeerId,
    card: ModelCard,
    layers: LayerRange,
    kv_tokens: int,
    numerics: NumericsId,
    *,
    standby: bool = False,
    pinned: bool = False,
) -> int:
    """Ask a peer to load layers, and wait until they are active there. `numerics`: those with which it is expected to compute.

    Returns: the number of tokens that the peer has KV for.
    Raises: PeerFault.
    Cancel: the peer still finishes the load if it has begun.
    """
    request = Place(
        request=links.next_request(),
        model=card.id,
        ref=shown_to_peers(card).ref,
        layers=layers,
        kv_tokens=kv_tokens,
        deadline_ms=int(_DEADLINE_S * 1000),
        standby=standby,
        pinned=pinned,
        numerics=numerics,
    )
    reply, _ = await links.request(peer, request, timeout_s=_DEADLINE_S)
    if not isinstance(reply, Placed):
        raise ProtocolViolation(f"PLACE was answered with {type(reply).__name__}")
    return reply.kv_tokens


def _is_pinned(mesh: MeshOptions) -> bool:
    """Whether the user chose peers, their number, stages or an objective other than latency. The keeper keeps such a placement."""
    by_speed = mesh.objective in (None, Objective.LATENCY)
    return mesh.stages is not None or mesh.min_peers is not None or mesh.peers is not None or not by_speed


def _failure_of(results: Mapping[StagePlan, BaseException | int], kv_tokens: int) -> MeshdError:
    """Pick the error of a peer that could not load its layers, or reserved too little KV.

    Raises: any exception among `results` that is not a MeshdError.
    """
    failures = [result for result in results.values() if isinstance(result, BaseException)]
    if not failures:
        granted = min(result for result in results.values() if isinstance(result, int))
        return OutOfMemory(f"a peer reserved KV for {granted} tokens, not {kv_tokens}", hint="see that peer's log")
    for failure in failures:
        if not isinstance(failure, MeshdError):
            raise failure
    assert isinstance(failures[-1], MeshdError)
    return failures[-1]


def _choose_stages(
    problem: PlanInput, missing: tuple[LayerRange, ...], kv_tokens: int, least_tokens: int, failure: MeshdError | None
) -> tuple[tuple[StagePlan, ...], int]:
    """Choose the peers that load missing layers.

    Returns: the stages, and the number of tokens to reserve KV for.
    Raises: NoPeer; DoesNotFit, with `failure` as its cause: the error of the peers that were chosen before.
    """
    try:
        return repair_within(problem, missing, kv_tokens=kv_tokens, least_tokens=least_tokens)
    except DoesNotFit as error:
        raise error from failure
