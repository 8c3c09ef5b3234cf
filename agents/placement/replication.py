"""Decides which layers to load, and on which peers, to keep models placed.

`decide` chooses the peers that take over the layers of lost or draining peers, and the peers that get standby copies. `grow`
finds a placement that is so much faster that it is worth loading. `keeper.py` sends the requests.

House rules of this file: no I/O, no clock. Equal adverts give equal requests. Once all requests are met, there are no new ones.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product

import msgspec

from meshd.agents.placement.history import HELD, ServedLayers, holdings_of, layers_of, models_in, served_by
from meshd.agents.placement.plan_input import CONTEXTS_OF_KV, LEAST_CONTEXT, plan_input_of, repair_input
from meshd.agents.service import MeshOptions
from meshd.errors import DoesNotFit, MeshdError, NoPeer
from meshd.numerics import NumericsId
from meshd.planner.eligible import exclusions
from meshd.planner.model.memory import allowed_bytes, stage_memory
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import profiles_from_adverts
from meshd.planner.search.repair import repair_within
from meshd.planner.search.solve import Solution, solve
from meshd.types import Advert, Holding, LayerRange, ModelCard, ModelId, PeerId, StagePlan, ranges_of

_STAYS_FREE = 0.5
"""A standby copy must leave this fraction of a peer's offered memory (free and reserved) free."""
_GAIN = 0.10
"""A new placement is worth loading if its predicted time per token is shorter by at least this fraction."""


@dataclass(frozen=True, slots=True, order=True)
class LoadRequest:
    """A request that a peer load layers. If the peer has a standby copy of them and `standby` is false, the copy is promoted."""

    peer: PeerId
    model: ModelId
    layers: LayerRange
    kv_tokens: int
    standby: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """The input of `decide`."""

    adverts: Sequence[Advert]
    """Adverts of the live peers and the suspects."""
    cards: Mapping[ModelId, ModelCard]
    lost: Mapping[ModelId, Collection[ServedLayers]] = field(default_factory=dict)
    """See `HoldingHistory.lost`."""
    unplaced: Collection[ModelId] = ()
    """See `HoldingHistory.unplaced`."""
    suspects: Collection[PeerId] = ()
    """Peers whose layers count as served, but which get no new layers."""
    refused: Collection[tuple[PeerId, ModelId]] = ()
    """Pairs `(peer, model)`: the peer recently failed to load layers of the model."""
    pending: Sequence[LoadRequest] = ()
    """Requests that are sent and not answered yet."""
    copies: int = 2
    """Number of peers that should hold each layer, the serving peer included."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The result of `decide`."""

    requests: tuple[LoadRequest, ...]
    missing: tuple[str, ...]
    """Messages about lost layers that fit on no peers."""


def decide(cluster: ClusterState) -> Decision:
    """Decide which layers to load for the active models: first layers that no peer serves, then standby copies."""
    return _Policy(cluster).decide()


def orphaned_copies(adverts: Iterable[Advert], unplaced: Collection[ModelId]) -> list[tuple[PeerId, ModelId]]:
    """Find active standby copies of unplaced models. They were still loading when their model was unplaced."""
    return [
        (advert.peer, model)
        for advert in adverts
        for model in sorted({holding.model for holding in advert.holdings if holding.state == "active"} & set(unplaced))
    ]


def grow(card: ModelCard, adverts: Sequence[Advert]) -> list[LoadRequest]:
    """Choose layers to load that make new sessions of a model clearly faster. Returns: no requests if the placement is pinned.

    Placements are compared by the rates that every device measured when it started. Times that were measured on loaded layers are
    ignored, because only peers with such layers have them.
    """
    staying = [advert for advert in adverts if not advert.draining]
    serving = [holding for _, holding in holdings_of(staying, card.id) if holding.state == "active" and not holding.standby]
    if not serving or any(holding.pinned for holding in serving):
        return []
    kv_tokens = min(holding.kv_tokens_total for holding in serving)
    context = min(kv_tokens, card.spec.context_length)
    problem = plan_input_of(card, [_without_times(advert) for advert in staying], MeshOptions(), context=context)
    try:
        better = solve(problem)
        now = solve(plan_input_of(card, [_idle(advert) for advert in staying], MeshOptions(), context=context, resident_only=True))
    except MeshdError:
        return []
    if better.estimate.tpot_s > (1 - _GAIN) * now.estimate.tpot_s:
        return []
    return [request for request in _requests_of(problem, better, kv_tokens) if not _serves(staying, request)]


class _Policy:
    """One run of `decide`. Each request is applied to the adverts, so that later decisions assume that the request is met."""

    def __init__(self, cluster: ClusterState) -> None:
        self._cluster = cluster
        adverts = sorted(cluster.adverts, key=lambda advert: advert.peer)
        self._adverts = {advert.peer: _within_models(advert, cluster.cards) for advert in adverts}
        self._requests: list[LoadRequest] = []
        self._missing: list[str] = []
        for request in cluster.pending:
            self._apply(request)

    def decide(self) -> Decision:
        models = models_in(self._adverts.values(), {"active"}) - set(self._cluster.unplaced)
        for card in (self._cluster.cards[model] for model in sorted(models) if model in self._cluster.cards):
            lost = self._lost(card)
            self._promote(card, lost)
            self._repair(card, lost)
            self._copy(card)
        return Decision(tuple(self._requests), tuple(self._missing))

    def _staying(self) -> list[Advert]:
        return [advert for advert in self._adverts.values() if not advert.draining]

    def _lost(self, card: ModelCard) -> list[ServedLayers]:
        """List the layers that lost peers served and those that draining peers still serve, as far as the model has them."""
        leaving = (served_by(advert).get(card.id, ()) for advert in self._adverts.values() if advert.draining)
        known = {*self._cluster.lost.get(card.id, ()), *chain.from_iterable(leaving)}
        return sorted(entry for entry in known if entry.layers in card.layers)

    def _promote(self, card: ModelCard, lost: Sequence[ServedLayers]) -> None:
        """Request that peers promote standby copies of layers that no peer serves any more."""
        holdings = holdings_of(self._staying(), card.id)
        unserved = set(card.layers) - layers_of(holding for _, holding in holdings if not holding.standby)
        copies = ((holding.layers.start, -holding.layers.end, peer, holding) for peer, holding in holdings if holding.standby)
        for _, _, peer, copy in sorted(copies, key=lambda each: each[:3]):
            if unserved.intersection(copy.layers):
                unserved.difference_update(copy.layers)
                pinned = any(entry.pinned for entry in lost if set(entry.layers).intersection(copy.layers))
                self._request(LoadRequest(peer, card.id, copy.layers, copy.kv_tokens_total, pinned=pinned))

    def _repair(self, card: ModelCard, lost: Sequence[ServedLayers]) -> None:
        """Place lost layers on other peers, if that makes the model complete. Otherwise the model is being unplaced."""
        present = layers_of(holding for _, holding in holdings_of(self._staying(), card.id))
        gone = {layer for entry in lost for layer in entry.layers}
        if present.issuperset(card.layers) or not (present | gone).issuperset(card.layers):
            return
        for entry in lost:
            runs = ranges_of(set(entry.layers) - present)
            present.update(entry.layers)
            if runs:
                self._place(card, runs, entry)

    def _place(self, card: ModelCard, runs: tuple[LayerRange, ...], lost: ServedLayers) -> None:
        """Request that peers load lost layers: peers with the numerics of those that serve the model if there is any choice, then
        preferably peers that have no other layers of the model.

        A route uses only one run of layers of each peer. If KV for a whole context does not fit on the preferred peers, any peer
        may be chosen.
        """
        serving = {peer for peer, _ in holdings_of(self._staying(), card.id)}
        whole_context = max(LEAST_CONTEXT, lost.kv_tokens // CONTEXTS_OF_KV)
        why = ""
        for one_numerics, (least_tokens, avoid) in product(
            (True, False), ((whole_context, serving), (LEAST_CONTEXT, set[PeerId]()))
        ):
            try:
                stages, kv_tokens = self._choose_stages(card, runs, lost.kv_tokens, least_tokens, avoid, one_numerics)
            except (DoesNotFit, NoPeer) as error:
                why = error.message
                continue
            for stage in stages:
                self._request(LoadRequest(stage.peer, card.id, stage.layers, kv_tokens, pinned=lost.pinned))
            return
        self._missing.append(f"{card.name} has lost layers {', '.join(map(str, runs))}: {why}")

    def _choose_stages(
        self,
        card: ModelCard,
        runs: tuple[LayerRange, ...],
        kv_tokens: int,
        least_tokens: int,
        avoid: Collection[PeerId],
        one_numerics: bool,
    ) -> tuple[tuple[StagePlan, ...], int]:
        """Choose peers for missing layers. Returns: stages, and how many tokens to reserve KV for. Raises: DoesNotFit, NoPeer."""
        unfit = {peer for peer, model in self._cluster.refused if model == card.id} | set(self._cluster.suspects) | set(avoid)
        problem = repair_input(card, list(self._adverts.values()), avoid=unfit)
        return repair_within(problem, runs, kv_tokens=kv_tokens, least_tokens=least_tokens, one_numerics=one_numerics)

    def _copy(self, card: ModelCard) -> None:
        """Request standby copies of stages that too few peers have. A copy is of a whole stage, so that one peer can take over."""
        holdings = holdings_of(self._staying(), card.id)
        if not layers_of(holding for _, holding in holdings if holding.state == "active").issuperset(card.layers):
            return
        holders: dict[int, set[PeerId]] = {layer: set() for layer in card.layers}
        for peer, holding in holdings:
            for layer in holding.layers:
                holders[layer].add(peer)
        tokens: dict[LayerRange, int] = {}
        for _, holding in holdings:
            if not holding.standby:
                tokens[holding.layers] = max(holding.kv_tokens_total, tokens.get(holding.layers, 0))
        for layers in sorted(tokens):
            for _ in range(min(len(holders[layer]) for layer in layers), self._cluster.copies):
                target = self._copy_target(card, layers, tokens[layers])
                if target is None:
                    break
                self._request(LoadRequest(target, card.id, layers, tokens[layers], standby=True))
                for layer in layers:
                    holders[layer].add(target)

    def _copy_target(self, card: ModelCard, layers: LayerRange, kv_tokens: int) -> PeerId | None:
        """Choose the peer with the most free memory for a standby copy. Returns: None if no peer has enough.

        Peers with the numerics of those that serve the layers come first: elsewhere an answer may continue with other tokens. Then
        come peers that serve no other stage of the model: one lost peer should not take both a stage and another's copy.
        """
        own = self._numerics_of(card, layers)
        excluded = exclusions(plan_input_of(card, list(self._adverts.values()), MeshOptions(), context=kv_tokens))
        fitting = []
        for advert in self._staying():
            peer = advert.peer
            holdings = [holding for holding in advert.holdings if holding.model == card.id and holding.state != "failed"]
            if peer in excluded or peer in self._cluster.suspects or (peer, card.id) in self._cluster.refused:
                continue
            if any(layers.overlaps(holding.layers) for holding in holdings):
                continue
            free = advert.capability.memory_free_bytes
            stays = free - _needed_bytes(card, advert, layers, kv_tokens)
            if stays >= _STAYS_FREE * (free + _reserved_bytes(advert, self._cluster.cards)):
                serves = any(not holding.standby for holding in holdings)
                fitting.append((advert.capability.numerics not in own, serves, -free, peer))
        return min(fitting)[-1] if fitting else None

    def _numerics_of(self, card: ModelCard, layers: LayerRange) -> set[NumericsId]:
        """Return the ids of the peers that serve these layers."""
        return {
            advert.capability.numerics
            for advert in self._staying()
            for holding in advert.holdings
            if holding.model == card.id and holding.state == "active" and not holding.standby and layers in holding.layers
        }

    def _request(self, request: LoadRequest) -> None:
        self._requests.append(request)
        self._apply(request)

    def _apply(self, request: LoadRequest) -> None:
        card, advert = self._cluster.cards.get(request.model), self._adverts.get(request.peer)
        if card is not None and advert is not None:
            self._adverts[request.peer] = apply_request(advert, request, card)


def _within_models(advert: Advert, cards: Mapping[ModelId, ModelCard]) -> Advert:
    """Leave out the holdings of layers that their model does not have: a peer may advertise anything."""
    holdings = tuple(held for held in advert.holdings if held.model not in cards or held.layers in cards[held.model].layers)
    return advert if len(holdings) == len(advert.holdings) else msgspec.structs.replace(advert, holdings=holdings)


def apply_request(advert: Advert, request: LoadRequest, card: ModelCard) -> Advert:
    """Compute the advert that a peer sends once it has begun to meet `request`."""
    for place, holding in enumerate(advert.holdings):
        if holding.model == request.model and holding.layers == request.layers and holding.state in HELD:
            updated = msgspec.structs.replace(
                holding, standby=holding.standby and request.standby, pinned=holding.pinned or request.pinned
            )
            holdings = (*advert.holdings[:place], updated, *advert.holdings[place + 1 :])
            return msgspec.structs.replace(advert, holdings=holdings)
    needed = _needed_bytes(card, advert, request.layers, request.kv_tokens)
    free = max(0, advert.capability.memory_free_bytes - needed)
    new = Holding(
        model=request.model,
        layers=request.layers,
        state="loading",
        weight_bytes=needed - request.kv_tokens * len(request.layers) * card.kv_bytes_per_token_layer(),
        kv_tokens_total=request.kv_tokens,
        kv_tokens_free=request.kv_tokens,
        standby=request.standby,
        pinned=request.pinned,
    )
    capability = msgspec.structs.replace(advert.capability, memory_free_bytes=free)
    return msgspec.structs.replace(advert, capability=capability, holdings=(*advert.holdings, new))


def _needed_bytes(card: ModelCard, advert: Advert, layers: LayerRange, kv_tokens: int) -> int:
    """Predict the memory that layers would take on the peer of an advert."""
    profiles = profiles_from_adverts([advert], card.id)
    problem = PlanInput(card=card, profiles=profiles, network=Network({}), context=kv_tokens)
    return stage_memory(problem, StagePlan(peer=advert.peer, layers=layers)).total_bytes


def _reserved_bytes(advert: Advert, cards: Mapping[ModelId, ModelCard]) -> int:
    """Add up the memory that a peer's holdings reserve. KV of models without a card is left out, so the sum may be too small."""
    kv_bytes = {model: card.kv_bytes_per_token_layer() for model, card in cards.items()}
    return sum(
        holding.weight_bytes + holding.kv_tokens_total * len(holding.layers) * kv_bytes.get(holding.model, 0)
        for holding in advert.holdings
    )


def _without_times(advert: Advert) -> Advert:
    """Return the advert without the times that were measured on loaded layers."""
    holdings = tuple(
        msgspec.structs.replace(holding, layer_decode_s=None, layer_prefill_s=None, head_s=None) for holding in advert.holdings
    )
    return msgspec.structs.replace(advert, holdings=holdings)


def _idle(advert: Advert) -> Advert:
    """Return the advert without measured times and standby copies, and with all KV free, as if no session ran."""
    holdings = tuple(
        msgspec.structs.replace(holding, kv_tokens_free=holding.kv_tokens_total)
        for holding in _without_times(advert).holdings
        if not holding.standby
    )
    return msgspec.structs.replace(advert, holdings=holdings)


def _requests_of(problem: PlanInput, solution: Solution, kv_tokens: int) -> list[LoadRequest]:
    """Turn a placement into requests with KV for `kv_tokens` tokens each, or for fewer if the peer's memory is short."""
    requests = []
    for stage in solution.stages:
        spare = allowed_bytes(problem, problem.profile(stage.peer)) - stage_memory(problem, stage).total_bytes
        more = int(spare // (problem.kv_token_layer_bytes * len(stage.layers)))
        tokens = min(kv_tokens, problem.context + max(0, more))
        requests.append(LoadRequest(stage.peer, problem.card.id, stage.layers, tokens))
    return requests


def _serves(adverts: Iterable[Advert], request: LoadRequest) -> bool:
    return any(
        peer == request.peer
        and request.layers in holding.layers
        and not holding.standby
        and holding.kv_tokens_total >= request.kv_tokens
        for peer, holding in holdings_of(adverts, request.model)
    )
