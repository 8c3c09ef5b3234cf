"""What it takes to keep models placed: anew where a peer took layers with it, twice where memory allows, elsewhere if faster.

House rules of this file: no I/O, no clock. Adverts in, requests out; the same adverts give the same requests, and once these are
met there are no more.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from meshd.agents.placement.plan_input import CONTEXTS_OF_KV, LEAST_CONTEXT, plan_input_of, repair_input
from meshd.agents.service import MeshOptions
from meshd.errors import DoesNotFit, MeshdError, NoPeer
from meshd.planner.eligible import exclusions
from meshd.planner.model.memory import allowed_bytes, stage_memory
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.search.repair import repair_within
from meshd.planner.search.solve import Solution, solve
from meshd.types import Advert, Holding, LayerRange, ModelCard, ModelId, PeerId, StagePlan, ranges_of

HELD = frozenset({"loading", "warm", "active"})
"""States of a holding that serves, or soon will."""
_STAYS_FREE = 0.5
"""Of the memory that a peer offers, beside a standby copy."""
_GAIN = 0.10
"""By how much a placement must be predicted to be faster before it is worth the loading."""


@dataclass(frozen=True, slots=True, order=True)
class LoadRequest:
    """Layers to be loaded on a peer; or, if they lie there as a standby copy and this is none, to be one no more."""

    peer: PeerId
    model: ModelId
    layers: LayerRange
    kv_tokens: int
    standby: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True, order=True)
class ServedLayers:
    """Layers that a peer held to serve with."""

    layers: LayerRange
    kv_tokens: int
    pinned: bool = False


class HoldingHistory:
    """What lay where at the last look, so that a loss can be told from a model that was let go."""

    def __init__(self) -> None:
        self.lost: dict[ModelId, set[ServedLayers]] = {}
        """What went with its peer and is not served by another yet, of models that are still active somewhere."""
        self.let_go: set[ModelId] = set()
        """Models that were unplaced, while standby copies of them are still about."""
        self._held: dict[tuple[PeerId, int], dict[ModelId, set[ServedLayers]]] = {}
        self._unplaced: set[ModelId] = set()
        """Let go of by somebody since the last look."""

    def note(self, advert: Advert) -> None:
        """Take in one advert as it comes: what was loaded and lost between two looks is lost too."""
        pieces = _pieces(advert)
        before = self._held.get((advert.peer, advert.incarnation), {})
        self._unplaced |= before.keys() - pieces.keys()
        self._held[advert.peer, advert.incarnation] = pieces

    def look(self, adverts: Iterable[Advert]) -> None:
        """Take in the adverts of all peers with a standing link; one that restarted has lost what it held."""
        known = list(adverts)
        for advert in known:
            self.note(advert)
        now = {(advert.peer, advert.incarnation): self._held[advert.peer, advert.incarnation] for advert in known}
        for peer, pieces in self._held.items():
            if peer not in now:
                for model, taken in pieces.items():
                    self.lost.setdefault(model, set()).update(taken)
        unplaced, self._unplaced = self._unplaced, set()
        served = {model for pieces in now.values() for model in pieces}
        self.let_go = ((self.let_go | unplaced) - served) & _present(known, HELD)
        self._held = now
        self._forget(known, unplaced - served)

    def _forget(self, adverts: Sequence[Advert], unplaced: Collection[ModelId]) -> None:
        staying = [advert for advert in adverts if not advert.draining]
        for model in self.lost.keys() - (_present(adverts, {"active"}) - set(unplaced)):
            del self.lost[model]
        for model, pieces in list(self.lost.items()):
            served = _layers(held for _, held in _holdings(staying, model) if held.state == "active" and not held.standby)
            self.lost[model] = {piece for piece in pieces if not served.issuperset(piece.layers)}
            if not self.lost[model]:
                del self.lost[model]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """All that a decision depends on."""

    adverts: Sequence[Advert]
    """Of the live peers and of the suspects."""
    cards: Mapping[ModelId, ModelCard]
    lost: Mapping[ModelId, Collection[ServedLayers]] = field(default_factory=dict)
    let_go: Collection[ModelId] = ()
    suspects: Collection[PeerId] = ()
    """They keep what they hold and get nothing new."""
    refused: Collection[tuple[PeerId, ModelId]] = ()
    """Who could not load something of a model lately."""
    pending: Sequence[LoadRequest] = ()
    """Asked for and not answered yet."""
    copies: int = 2


@dataclass(frozen=True, slots=True)
class Decision:
    """What to ask for, and what can't be had."""

    requests: tuple[LoadRequest, ...]
    missing: tuple[str, ...]


def decide(mesh: ClusterState) -> Decision:
    """What the models that are active somewhere need: first that all layers are served, then that none hangs on one peer."""
    return _Policy(mesh).decide()


def orphaned_copies(adverts: Iterable[Advert], let_go: Collection[ModelId]) -> list[tuple[PeerId, ModelId]]:
    """Who still holds a standby copy of a model that was unplaced: it was being loaded at that time."""
    return [
        (advert.peer, model)
        for advert in adverts
        for model in sorted({held.model for held in advert.holdings if held.state == "active"} & set(let_go))
    ]


def grow(card: ModelCard, adverts: Sequence[Advert]) -> list[LoadRequest]:
    """What to load so that new sessions of a model are clearly faster; nothing if somebody said where its layers are to lie.

    Compared by what all devices measured alike when they started: times taken on loaded layers are there for some of them only.
    """
    staying = [advert for advert in adverts if not advert.draining]
    serving = [held for _, held in _holdings(staying, card.id) if held.state == "active" and not held.standby]
    if not serving or any(held.pinned for held in serving):
        return []
    kv_tokens = min(held.kv_tokens_total for held in serving)
    context = min(kv_tokens, card.spec.context_length)
    question = plan_input_of(card, [_as_new(advert) for advert in staying], MeshOptions(), context=context)
    try:
        better = solve(question)
        now = solve(
            plan_input_of(card, [_at_rest(advert) for advert in staying], MeshOptions(), context=context, resident_only=True)
        )
    except MeshdError:
        return []
    if better.estimate.tpot_s > (1 - _GAIN) * now.estimate.tpot_s:
        return []
    return [request for request in _wishes_of(question, better, kv_tokens) if not _serves(staying, request)]


class _Policy:
    """One decision being made: every request is taken as met by those after it."""

    def __init__(self, mesh: ClusterState) -> None:
        self._mesh = mesh
        self._adverts = {advert.peer: advert for advert in sorted(mesh.adverts, key=lambda advert: advert.peer)}
        self._wishes: list[LoadRequest] = []
        self._missing: list[str] = []
        for request in mesh.pending:
            self._meet(request)

    def decide(self) -> Decision:
        models = _present(self._adverts.values(), {"active"}) - set(self._mesh.let_go)
        for card in (self._mesh.cards[model] for model in sorted(models) if model in self._mesh.cards):
            lost = self._lost(card)
            self._promote(card, lost)
            self._repair(card, lost)
            self._copy(card)
        return Decision(tuple(self._wishes), tuple(self._missing))

    def _staying(self) -> list[Advert]:
        return [advert for advert in self._adverts.values() if not advert.draining]

    def _lost(self, card: ModelCard) -> list[ServedLayers]:
        """What went with its peer, and what will."""
        leaving = (_pieces(advert).get(card.id, ()) for advert in self._adverts.values() if advert.draining)
        return sorted({*self._mesh.lost.get(card.id, ()), *chain.from_iterable(leaving)})

    def _promote(self, card: ModelCard, lost: Sequence[ServedLayers]) -> None:
        """Standby copies of layers that nobody else serves any more take over."""
        holdings = _holdings(self._staying(), card.id)
        bare = set(card.layers) - _layers(held for _, held in holdings if not held.standby)
        copies = ((held.layers.start, -held.layers.end, peer, held) for peer, held in holdings if held.standby)
        for _, _, peer, held in sorted(copies, key=lambda copy: copy[:3]):
            if bare.intersection(held.layers):
                bare.difference_update(held.layers)
                pinned = any(piece.pinned for piece in lost if set(piece.layers).intersection(held.layers))
                self._wish(LoadRequest(peer, card.id, held.layers, held.kv_tokens_total, pinned=pinned))

    def _repair(self, card: ModelCard, lost: Sequence[ServedLayers]) -> None:
        """Place lost layers anew, if the model is whole again then: what is being unplaced is not."""
        there = _layers(held for _, held in _holdings(self._staying(), card.id))
        gone = {layer for piece in lost for layer in piece.layers}
        if there.issuperset(card.layers) or not (there | gone).issuperset(card.layers):
            return
        for piece in lost:
            runs = ranges_of(set(piece.layers) - there)
            there.update(piece.layers)
            if runs:
                self._place(card, runs, piece)

    def _place(self, card: ModelCard, runs: tuple[LayerRange, ...], piece: ServedLayers) -> None:
        """On peers that serve nothing else of the model, if a whole context fits there; else wherever it does."""
        serving = {peer for peer, _ in _holdings(self._staying(), card.id)}
        whole_context = max(LEAST_CONTEXT, piece.kv_tokens // CONTEXTS_OF_KV)
        try:
            stages, kv_tokens = self._fitted(card, runs, piece.kv_tokens, whole_context, avoid=serving)
        except (DoesNotFit, NoPeer):
            try:
                stages, kv_tokens = self._fitted(card, runs, piece.kv_tokens, LEAST_CONTEXT)
            except (DoesNotFit, NoPeer) as error:
                self._missing.append(f"{card.name} has lost layers {', '.join(map(str, runs))}: {error.message}")
                return
        for stage in stages:
            self._wish(LoadRequest(stage.peer, card.id, stage.layers, kv_tokens, pinned=piece.pinned))

    def _fitted(
        self, card: ModelCard, runs: tuple[LayerRange, ...], kv_tokens: int, least_tokens: int, avoid: Collection[PeerId] = ()
    ) -> tuple[tuple[StagePlan, ...], int]:
        """Stages, and the tokens of KV that they have room for. Raises: DoesNotFit, NoPeer."""
        unfit = {peer for peer, model in self._mesh.refused if model == card.id} | set(self._mesh.suspects) | set(avoid)
        question = repair_input(card, list(self._adverts.values()), avoid=unfit)
        return repair_within(question, runs, kv_tokens=kv_tokens, least_tokens=least_tokens)

    def _copy(self, card: ModelCard) -> None:
        """Standby copies of every stage that would leave a gap: whole stages, so that a lost one is made good by one peer."""
        holdings = _holdings(self._staying(), card.id)
        if not _layers(held for _, held in holdings if held.state == "active").issuperset(card.layers):
            return
        holders: dict[int, set[PeerId]] = {layer: set() for layer in card.layers}
        for peer, held in holdings:
            for layer in held.layers:
                holders[layer].add(peer)
        tokens: dict[LayerRange, int] = {}
        for _, held in holdings:
            if not held.standby:
                tokens[held.layers] = max(held.kv_tokens_total, tokens.get(held.layers, 0))
        for layers in sorted(tokens):
            for _ in range(min(len(holders[layer]) for layer in layers), self._mesh.copies):
                target = self._roomiest(card, layers, tokens[layers])
                if target is None:
                    break
                self._wish(LoadRequest(target, card.id, layers, tokens[layers], standby=True))
                for layer in layers:
                    holders[layer].add(target)

    def _roomiest(self, card: ModelCard, layers: LayerRange, kv_tokens: int) -> PeerId | None:
        """Who has the most room, out of those that would lose no other stage of the model as well if there are any."""
        excluded = exclusions(plan_input_of(card, list(self._adverts.values()), MeshOptions(), context=kv_tokens))
        fitting = []
        for advert in self._staying():
            peer = advert.peer
            held = [held for held in advert.holdings if held.model == card.id and held.state != "failed"]
            if peer in excluded or peer in self._mesh.suspects or (peer, card.id) in self._mesh.refused:
                continue
            if any(layers.overlaps(other.layers) for other in held):
                continue
            free = advert.capability.memory_free_bytes
            stays = free - _needed(card, peer, layers, kv_tokens)
            if stays >= _STAYS_FREE * (free + _taken(advert, self._mesh.cards)):
                fitting.append((any(not other.standby for other in held), -free, peer))
        return min(fitting)[2] if fitting else None

    def _wish(self, request: LoadRequest) -> None:
        self._wishes.append(request)
        self._meet(request)

    def _meet(self, request: LoadRequest) -> None:
        card, advert = self._mesh.cards.get(request.model), self._adverts.get(request.peer)
        if card is not None and advert is not None:
            self._adverts[request.peer] = apply_request(advert, request, card)


def apply_request(advert: Advert, request: LoadRequest, card: ModelCard) -> Advert:
    """What a peer would advertise once it has begun to load what it is asked for."""
    for place, held in enumerate(advert.holdings):
        if held.model == request.model and held.layers == request.layers and held.state in HELD:
            settled = msgspec.structs.replace(held, standby=held.standby and request.standby, pinned=held.pinned or request.pinned)
            holdings = (*advert.holdings[:place], settled, *advert.holdings[place + 1 :])
            return msgspec.structs.replace(advert, holdings=holdings)
    needed = _needed(card, request.peer, request.layers, request.kv_tokens)
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


def _pieces(advert: Advert) -> dict[ModelId, set[ServedLayers]]:
    """What a peer serves with, or soon will."""
    pieces: dict[ModelId, set[ServedLayers]] = {}
    for held in advert.holdings:
        if held.state in HELD and not held.standby:
            pieces.setdefault(held.model, set()).add(ServedLayers(held.layers, held.kv_tokens_total, held.pinned))
    return pieces


def _holdings(adverts: Iterable[Advert], model: ModelId) -> list[tuple[PeerId, Holding]]:
    return [(advert.peer, held) for advert in adverts for held in advert.holdings if held.model == model and held.state in HELD]


def _present(adverts: Iterable[Advert], states: Collection[str]) -> set[ModelId]:
    return {held.model for advert in adverts for held in advert.holdings if held.state in states}


def _layers(holdings: Iterable[Holding]) -> set[int]:
    return {layer for held in holdings for layer in held.layers}


def _needed(card: ModelCard, peer: PeerId, layers: LayerRange, kv_tokens: int) -> int:
    problem = PlanInput(card=card, profiles=(), network=Network({}), context=kv_tokens)
    return stage_memory(problem, StagePlan(peer=peer, layers=layers)).total_bytes


def _taken(advert: Advert, cards: Mapping[ModelId, ModelCard]) -> int:
    """What a peer's holdings have reserved. KV of a model whose card is not known is left out: the peer only looks smaller."""
    kv_bytes = {model: card.kv_bytes_per_token_layer() for model, card in cards.items()}
    return sum(
        held.weight_bytes + held.kv_tokens_total * len(held.layers) * kv_bytes.get(held.model, 0) for held in advert.holdings
    )


def _as_new(advert: Advert) -> Advert:
    """Without the times that only who holds layers has measured."""
    holdings = tuple(
        msgspec.structs.replace(held, layer_decode_s=None, layer_prefill_s=None, head_s=None) for held in advert.holdings
    )
    return msgspec.structs.replace(advert, holdings=holdings)


def _at_rest(advert: Advert) -> Advert:
    """Likewise, with no session, and only what serves new ones."""
    holdings = tuple(
        msgspec.structs.replace(held, kv_tokens_free=held.kv_tokens_total) for held in _as_new(advert).holdings if not held.standby
    )
    return msgspec.structs.replace(advert, holdings=holdings)


def _wishes_of(question: PlanInput, solution: Solution, kv_tokens: int) -> list[LoadRequest]:
    """A placement's stages, with KV as the model has it now where memory allows."""
    requests = []
    for stage in solution.stages:
        spare = allowed_bytes(question, question.profile(stage.peer)) - stage_memory(question, stage).total_bytes
        more = int(spare // (question.kv_token_layer_bytes * len(stage.layers)))
        tokens = min(kv_tokens, question.context + max(0, more))
        requests.append(LoadRequest(stage.peer, question.card.id, stage.layers, tokens))
    return requests


def _serves(adverts: Iterable[Advert], request: LoadRequest) -> bool:
    return any(
        peer == request.peer and request.layers in held.layers and not held.standby and held.kv_tokens_total >= request.kv_tokens
        for peer, held in _holdings(adverts, request.model)
    )
