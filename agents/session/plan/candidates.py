"""Candidate plans for a session to continue under, and their costs. Pure: adverts in, stages out.

There are two kinds. A patch keeps the surviving stages of the old plan, with their KV and kept outputs, and fills the gaps between
them with resident layers, where possible on a peer that has a copy of the KV. A fresh route ignores the old plan. The cost of a
candidate is the pause until the next token, plus the predicted time of the tokens that are expected after it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeGuard

import msgspec

from meshd.agents.placement.plan_input import named_peers
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.resume import RecoveryRequest, StageHeld, expected_held, method_of, resume_points
from meshd.numerics import UNKNOWN, NumericsId
from meshd.planner.model.estimate import Estimate, estimate
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile, profiles_from_adverts
from meshd.planner.session.pause import pause_s
from meshd.planner.session.reroute import HeldKv, Reroute, reserve_all, reserve_in
from meshd.types import Advert, Holding, LayerRange, ModelCard, PeerId, Plan, StagePlan, ranges_of

MAX_STAGES = 64
"""Maximum number of stages of one plan."""
LEAST_GAIN = 0.10
"""Fraction of the time per token that a move must save. A running session is not moved for less."""
_EXPECTED_TOKENS = 64
"""An answer is expected to grow by this many tokens, or to double if it is longer. `max_tokens` is no guide: most answers end long
before it. If the answer grows further, its plan can be changed again later."""
_SERVING = frozenset({"active", "draining"})
"""States of a holding that can still have the KV of a running session."""

Stages = tuple[StagePlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRules:
    """Which peers may get stages of the session, besides the peers that already have some."""

    standby: bool = True
    """Standby copies of layers may be used."""
    leaving: bool = False
    """Peers that are about to leave may be used."""
    avoided: bool = False
    """Peers that the request says to avoid may be used."""
    own_numerics: bool = False
    """A layer may only be used where it is computed as in the old plan. A copy of its KV elsewhere does not count."""
    only: NumericsId | None = None
    """Only peers with these numerics may be used. None: any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Stages of a possible plan, with their predicted cost."""

    stages: Stages
    method: str
    pause_s: float
    estimate: Estimate
    cost_s: float
    """The pause, plus the predicted time of the tokens that are expected after it."""


@dataclass(frozen=True, slots=True)
class LayerShortage:
    """Layers that no usable peer can run for the session now."""

    missing: tuple[LayerRange, ...]
    """Layers that are not resident, or only with a KV capacity below the session's context."""
    busy: tuple[LayerRange, ...]
    """Layers whose KV capacity is taken by other sessions."""


@dataclass(frozen=True)
class CandidateSearch:
    """Searches for a plan for one session, over the peers that it may use."""

    problem: PlanInput
    """Resident layers only. KV that the session itself has reserved counts as free."""
    request: RecoveryRequest
    surviving: frozenset[int]
    """Stages of the old plan that still have their KV."""
    me: PeerId

    def best(self) -> Candidate | None:
        """Returns: the cheapest candidate; None if there is none."""
        found = [self.evaluate(stages) for stages in (*self._patches(), self._reroute.whole()) if self._possible(stages)]
        return min(found, key=lambda candidate: candidate.cost_s, default=None)

    def better(self, least_peers: int) -> Candidate | None:
        """Find a plan that is worth moving a running session to.

        least_peers: the plan must have at least this many different peers.
        Returns: of the plans that save at least `LEAST_GAIN` of the time per token, the plan that saves most time in total, after
        the cost of the move. None if none of them saves time in total.
        """
        old = self._old_stages
        if not old or len(self.surviving) < len(old):
            return None
        present = estimate(self.problem, old).tpot_s
        best, most_saved = None, 0.0
        for stages in (*self._swaps(), self._reroute.whole(), self._reroute.whole(under_way=False)):
            if not self._possible(stages) or len({stage.peer for stage in stages}) < least_peers:
                continue
            candidate = self.evaluate(stages, moved=True)
            gain = present - candidate.estimate.tpot_s
            copying_s = sum(seconds for _, seconds in self._copies(stages).values())
            saved = gain * self._expected_tokens - candidate.pause_s - copying_s
            if gain >= LEAST_GAIN * present and saved > most_saved:
                best, most_saved = candidate, saved
        return best

    def evaluate(self, stages: Stages, *, moved: bool = False) -> Candidate:
        """Predict pause, time per token and cost of these stages. `moved`: KV is copied before the change, where possible."""
        known = self.request.known
        held = list(expected_held(self.request, stages, self.surviving))
        for number in self._copies(stages) if moved else ():
            held[number] = StageHeld(known - 1, mirrored=True)
        points = resume_points(held, known)
        pause = pause_s(self.problem, stages, [point.start for point in points], known, self.me)
        predicted = estimate(self.problem, stages)
        return Candidate(
            stages=stages,
            method=method_of(held, points, known),
            pause_s=pause,
            estimate=predicted,
            cost_s=pause + self._expected_tokens * predicted.tpot_s,
        )

    def shortage(self) -> LayerShortage:
        """Returns: the layers for which no peer has enough KV, so that no plan is possible."""
        surviving = [layer for number in self.surviving for layer in self._old_stages[number].layers]
        free, total = set(surviving), set(surviving)
        for holding in (holding for peer in self._reroute.peers for holding in peer.usable_holdings):
            total.update(holding.layers if holding.kv_tokens_total >= self.request.context else ())
            free.update(holding.layers if holding.kv_tokens_free >= self.request.context else ())
        layers = self.problem.card.layers
        busy = [layer for layer in layers if layer in total and layer not in free]
        return LayerShortage(ranges_of([layer for layer in layers if layer not in total]), ranges_of(busy))

    @property
    def _old_stages(self) -> Stages:
        return self.request.old.stages if self.request.old is not None else ()

    @property
    def _expected_tokens(self) -> int:
        """Number of tokens that the answer is expected to grow by."""
        answered = self.request.known - self.request.prompt_tokens
        return max(1, min(self.request.context - self.request.known, max(_EXPECTED_TOKENS, answered)))

    @cached_property
    def _reroute(self) -> Reroute:
        return self._reroute_over(self.problem)

    def _reroute_over(self, problem: PlanInput) -> Reroute:
        old = self._old_stages
        held_kv = [HeldKv(old[number].peer, old[number].layers, self.request.known) for number in self.surviving]
        held_kv += [HeldKv(peer, old[number].layers, positions) for number, (peer, positions) in self.request.copies.items()]
        return Reroute(problem, self._expected_tokens, held_kv)

    def _possible(self, stages: Stages | None) -> TypeGuard[Stages]:
        return stages is not None and len(stages) <= MAX_STAGES and reserve_all(self.problem, stages) is not None

    def _patches(self) -> Iterator[Stages | None]:
        """Yield the surviving stages with the gaps filled; then the same with lost stages on the peers that have copies of them.

        None: a gap cannot be filled.
        """
        surviving = {number: self._old_stages[number] for number in self.surviving}
        copied = {
            number: StagePlan(peer=peer, layers=self._old_stages[number].layers)
            for number, (peer, _) in self.request.copies.items()
            if number not in surviving and self._has_room(peer, self._old_stages[number].layers)
        }
        if surviving:
            yield self._with_gaps_filled(surviving)
        if copied:
            yield self._with_gaps_filled(surviving | copied)

    def _swaps(self) -> Iterator[Stages | None]:
        """Yield, for each stage of the old plan, the plan with this stage replaced; None if it cannot be replaced."""
        for replaced in range(len(self._old_stages)):
            yield self._with_gaps_filled({number: stage for number, stage in enumerate(self._old_stages) if number != replaced})

    def _with_gaps_filled(self, kept: dict[int, StagePlan]) -> Stages | None:
        """Returns: a plan of these stages of the old plan and the cheapest cover of every gap; None if a gap cannot be covered."""
        old, reroute, problem = self._old_stages, self._reroute, self.problem
        stages: list[StagePlan] = []
        stages_to_fill = len(old) - len(kept)
        for is_kept, group in groupby(range(len(old)), key=kept.__contains__):
            numbers = list(group)
            if is_kept:
                stages += (StagePlan(peer=kept[number].peer, layers=kept[number].layers) for number in numbers)
                continue
            neighbours = (kept.get(number % len(old)) for number in (numbers[0] - 1, numbers[-1] + 1))
            before, after = (None if stage is None else stage.peer for stage in neighbours)
            found = reroute.fill(LayerRange(old[numbers[0]].layers.start, old[numbers[-1]].layers.end), before, after)
            if found is None:
                return None
            stages += found
            stages_to_fill -= len(numbers)
            if stages_to_fill:  # the next gap must not use KV that the stages of this gap take
                reserved = reserve_all(problem, found)
                if reserved is None:
                    return None
                problem, reroute = reserved, self._reroute_over(reserved)
        return tuple(stages)

    def _copies(self, stages: Stages) -> dict[int, tuple[int, float]]:
        """Returns: index in `stages` -> (old stage whose KV can be copied there while the session runs, seconds for the copy)."""
        return {number: copy for number, stage in enumerate(stages) if (copy := self._copy(stage)) is not None}

    def _copy(self, stage: StagePlan) -> tuple[int, float] | None:
        for number in self.surviving:
            old = self._old_stages[number]
            if stage.layers in old.layers:
                if old.peer == stage.peer or not self._has_room(stage.peer, old.layers):
                    return None
                size = self.problem.kv_token_layer_bytes * len(old.layers) * self.request.known
                return number, self.problem.network.hop_s(old.peer, stage.peer, size)
        return None

    def _has_room(self, peer: PeerId, layers: LayerRange) -> bool:
        """Whether the layers are resident on this peer, with enough free KV for the session."""
        holdings_of_peer = (profile.usable_holdings for profile in self._reroute.peers if profile.id == peer)
        return any(reserve_in(holdings, layers, self.request.context) is not None for holdings in holdings_of_peer)


def candidate_search(
    card: ModelCard, adverts: Sequence[Advert], mesh: MeshOptions, request: RecoveryRequest, me: PeerId, rules: PeerRules
) -> CandidateSearch:
    """Returns: the search over the peers' adverts. Raises: NoPeer if `mesh.peers` names peers, and none of them is alive."""
    profiles = profiles_from_adverts(adverts, card.id, decode_at=(request.known + request.context) / 2, prompt_tokens=request.known)
    surviving = frozenset(_surviving(profiles, request))
    problem = PlanInput(
        card=card,
        profiles=tuple(_as_usable(profile, request, surviving, rules) for profile in profiles),
        network=Network.from_adverts(adverts),
        context=request.context,
        prompt_tokens=request.known,
        peers=named_peers(mesh, profiles),
        resident_only=True,
    )
    return CandidateSearch(problem, request, surviving, me)


def _surviving(profiles: Sequence[PeerProfile], request: RecoveryRequest) -> Iterator[int]:
    """Yield the stages of the old plan that still have their KV.

    A peer that no longer advertises the layers has restarted or unloaded them: its KV is gone, even if no loss was reported.
    """
    gone = request.lost | request.avoid
    holdings_of = {profile.id: profile.holdings for profile in profiles if profile.id not in gone}
    for number, stage in enumerate(request.old.stages if request.old is not None else ()):
        if _serving(holdings_of.get(stage.peer, ()), stage.layers) is not None:
            yield number


def _serving(holdings: Sequence[Holding], layers: LayerRange) -> Holding | None:
    return next((holding for holding in holdings if holding.state in _SERVING and layers in holding.layers), None)


def _as_usable(profile: PeerProfile, request: RecoveryRequest, surviving: frozenset[int], rules: PeerRules) -> PeerProfile:
    """Returns: the peer with the holdings that the session may use: those that it has reserved, and others that the rules allow."""
    excluded = (profile.id in request.avoid and not rules.avoided) or (profile.draining and not rules.leaving)
    others = [] if excluded else [holding for holding in profile.holdings if rules.standby or not holding.standby]
    holdings = (*others, *_reserved(profile, request, surviving, rules))
    if rules.only not in (None, profile.numerics):
        holdings = ()
    if rules.own_numerics and request.old is not None:
        holdings = tuple(_own(holdings, _layers_with(request.old, profile.numerics)))
    return msgspec.structs.replace(profile, holdings=holdings, draining=False)


def _layers_with(plan: Plan, numerics: NumericsId) -> set[int]:
    """Return the layers that the plan computes with these numerics, and those of which it does not say with which."""
    numbered = enumerate(plan.stages)
    return {layer for number, stage in numbered if plan.numerics_of(number) in (UNKNOWN, numerics) for layer in stage.layers}


def _own(holdings: Iterable[Holding], layers: set[int]) -> Iterator[Holding]:
    """Yield the parts of the holdings that are of these layers."""
    for holding in holdings:
        if layers.issuperset(holding.layers):
            yield holding
        else:
            for run in ranges_of(layers.intersection(holding.layers)):
                yield msgspec.structs.replace(holding, layers=run)


def _reserved(profile: PeerProfile, request: RecoveryRequest, surviving: frozenset[int], rules: PeerRules) -> Iterator[Holding]:
    """Yield the layers of this peer that the session has reserved, as holdings with KV for the session's whole context."""
    if request.old is None:
        return
    avoided = rules.avoided and profile.id in request.avoid - request.lost
    stages = [(number, stage) for number, stage in enumerate(request.old.stages) if stage.peer == profile.id]
    reserved = [stage.layers for number, stage in stages if avoided or number in surviving]
    reserved += [request.old.stages[number].layers for number, (peer, _) in request.copies.items() if peer == profile.id]
    for layers in reserved:
        holding = _serving(profile.holdings, layers)
        if holding is not None:
            yield msgspec.structs.replace(
                holding,
                layers=layers,
                state="active",
                standby=False,
                kv_tokens_total=request.context,
                kv_tokens_free=request.context,
            )
