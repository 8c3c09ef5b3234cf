"""The candidates for going on with a session, and what they cost. Pure: adverts in, stages out.

A patch keeps the stages that survive, so that their KV and their kept outputs count, and covers the others with layers that lie
somewhere: where a copy of the KV lies, if there is one. A fresh route is planned without regard to the old one. What either costs
is the pause until the next token, and then the tokens that are expected to follow, at the plan's pace.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeGuard

import msgspec

from meshd.agents.placement.plan_input import named_peers
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.resume import RecoveryRequest, StageHeld, expected_held, method_of, resume_positions
from meshd.planner.model.estimate import Estimate, estimate
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile, profiles_from_adverts
from meshd.planner.session.pause import pause_s
from meshd.planner.session.reroute import STAGE_S, HeldKv, Reroute, reserve_all, reserve_in
from meshd.types import Advert, Holding, LayerRange, ModelCard, PeerId, StagePlan, ranges_of

MAX_STAGES = 64
"""Of one plan."""
LEAST_GAIN = 0.10
"""Of the time per token: for less a running session is not moved."""
_AHEAD_TOKENS = 64
"""Answers mostly end long before `max_tokens`: one is expected to grow by so much, or by as much as it has so far. A plan that is
slow later can be changed later, without a pause."""
_SERVING = frozenset({"active", "draining"})
"""States of the holdings in which the KV of a running session lies."""

Stages = tuple[StagePlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRules:
    """Who may take layers of the session beside those that have them."""

    standby: bool = True
    """Also layers that wait to take over."""
    leaving: bool = False
    """Also peers that are about to leave."""
    avoided: bool = False
    """Also those that the request says to avoid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Stages to go on with."""

    stages: Stages
    method: str
    pause_s: float
    estimate: Estimate
    cost_s: float
    """The pause, and the tokens that are expected to follow."""


@dataclass(frozen=True, slots=True)
class LayerShortage:
    """Layers that nobody can take now."""

    missing: tuple[LayerRange, ...]
    """They lie nowhere, or with KV for too few tokens."""
    busy: tuple[LayerRange, ...]
    """Other sessions have their KV."""


@dataclass(frozen=True)
class CandidateSearch:
    """One session's request, and the peers as this session may use them."""

    problem: PlanInput
    """Over what is resident; what the session has reserved counts as free."""
    request: RecoveryRequest
    surviving: frozenset[int]
    """Stages of the old plan whose KV is still there."""
    me: PeerId

    def best(self) -> Candidate | None:
        """The cheapest way to go on; None: there is none."""
        found = [self.judge(stages) for stages in (*self._patches(), self._refill.whole()) if self._possible(stages)]
        return min(found, key=lambda candidate: candidate.cost_s, default=None)

    def better(self, least_peers: int) -> Candidate | None:
        """For a session that runs: what saves `LEAST_GAIN` of the time per token, and more than the move costs."""
        old = self._old
        if not old or len(self.surviving) < len(old):
            return None
        present = estimate(self.problem, old).tpot_s
        best, most = None, 0.0
        for stages in (*self._swaps(), self._refill.whole(), self._refill.whole(under_way=False)):
            if not self._possible(stages) or len({stage.peer for stage in stages}) < least_peers:
                continue
            candidate = self.judge(stages, moved=True)
            gain = present - candidate.estimate.tpot_s
            a_token = gain - (len(stages) - len(old)) * STAGE_S
            saved = a_token * self._ahead - candidate.pause_s - sum(seconds for _, seconds in self._copies(stages).values())
            if gain >= LEAST_GAIN * present and saved > most:
                best, most = candidate, saved
        return best

    def judge(self, stages: Stages, *, moved: bool = False) -> Candidate:
        """What these stages would do; with `moved`, KV that can be copied before the change has been."""
        known = self.request.known
        held = list(expected_held(self.request, stages, self.surviving))
        for place in self._copies(stages) if moved else ():
            held[place] = StageHeld(known - 1, mirrored=True)
        resumptions = resume_positions(held, known)
        pause = pause_s(self.problem, stages, [resumption.start for resumption in resumptions], known, self.me)
        predicted = estimate(self.problem, stages)
        return Candidate(
            stages=stages,
            method=method_of(held, resumptions, known),
            pause_s=pause,
            estimate=predicted,
            cost_s=pause + self._ahead * (predicted.tpot_s + len(stages) * STAGE_S),
        )

    def shortage(self) -> LayerShortage:
        """The layers for want of which there is no plan."""
        kept = [layer for number in self.surviving for layer in self._old[number].layers]
        free, total = set(kept), set(kept)
        for held in (held for peer in self._refill.peers for held in peer.usable_holdings):
            total.update(held.layers if held.kv_tokens_total >= self.request.context else ())
            free.update(held.layers if held.kv_tokens_free >= self.request.context else ())
        every = self.problem.card.layers
        busy = [layer for layer in every if layer in total and layer not in free]
        return LayerShortage(ranges_of([layer for layer in every if layer not in total]), ranges_of(busy))

    @property
    def _old(self) -> Stages:
        return self.request.old.stages if self.request.old is not None else ()

    @property
    def _ahead(self) -> int:
        """Tokens that the answer is expected to have yet."""
        answered = self.request.known - self.request.prompt_tokens
        return max(1, min(self.request.context - self.request.known, max(_AHEAD_TOKENS, answered)))

    @cached_property
    def _refill(self) -> Reroute:
        return self._refill_of(self.problem)

    def _refill_of(self, problem: PlanInput) -> Reroute:
        credit = [HeldKv(self._old[number].peer, self._old[number].layers, self.request.known) for number in self.surviving]
        credit += [HeldKv(peer, self._old[number].layers, held) for number, (peer, held) in self.request.copies.items()]
        return Reroute(problem, self._ahead, credit)

    def _possible(self, stages: Stages | None) -> TypeGuard[Stages]:
        return stages is not None and len(stages) <= MAX_STAGES and reserve_all(self.problem, stages) is not None

    def _patches(self) -> Iterator[Stages | None]:
        """What survives, and a cover of the rest; and the same with the copies where they lie."""
        kept = {number: self._old[number] for number in self.surviving}
        copied = {
            number: StagePlan(peer=peer, layers=self._old[number].layers)
            for number, (peer, _) in self.request.copies.items()
            if number not in kept and self._holds(peer, self._old[number].layers)
        }
        if kept:
            yield self._with_gaps_filled(kept)
        if copied:
            yield self._with_gaps_filled(kept | copied)

    def _swaps(self) -> Iterator[Stages | None]:
        """The old plan with one stage taken elsewhere."""
        for number in range(len(self._old)):
            yield self._with_gaps_filled({place: stage for place, stage in enumerate(self._old) if place != number})

    def _with_gaps_filled(self, kept: dict[int, StagePlan]) -> Stages | None:
        """These stages of the old plan, and the cheapest cover of every gap between them."""
        old, refill, problem = self._old, self._refill, self.problem
        stages: list[StagePlan] = []
        gaps = len(old) - len(kept)
        for keeps, group in groupby(range(len(old)), key=kept.__contains__):
            numbers = list(group)
            if keeps:
                stages += (StagePlan(peer=kept[number].peer, layers=kept[number].layers) for number in numbers)
                continue
            neighbours = (kept.get(number % len(old)) for number in (numbers[0] - 1, numbers[-1] + 1))
            before, after = (None if stage is None else stage.peer for stage in neighbours)
            found = refill.fill(LayerRange(old[numbers[0]].layers.start, old[numbers[-1]].layers.end), before, after)
            if found is None:
                return None
            stages += found
            gaps -= len(numbers)
            if gaps:
                charged = reserve_all(problem, found)
                if charged is None:
                    return None
                problem, refill = charged, self._refill_of(charged)
        return tuple(stages)

    def _copies(self, stages: Stages) -> dict[int, tuple[int, float]]:
        """Place in `stages` -> the old stage whose KV can be copied there while it runs, and how long that takes."""
        return {place: copy for place, stage in enumerate(stages) if (copy := self._copy(stage)) is not None}

    def _copy(self, stage: StagePlan) -> tuple[int, float] | None:
        for number in self.surviving:
            old = self._old[number]
            if stage.layers in old.layers:
                if old.peer == stage.peer or not self._holds(stage.peer, old.layers):
                    return None
                size = self.problem.kv_token_layer_bytes * len(old.layers) * self.request.known
                return number, self.problem.network.hop_s(old.peer, stage.peer, size)
        return None

    def _holds(self, peer: PeerId, layers: LayerRange) -> bool:
        holdings = (profile.usable_holdings for profile in self._refill.peers if profile.id == peer)
        return any(reserve_in(held, layers, self.request.context) is not None for held in holdings)


def candidate_search(
    card: ModelCard, adverts: Sequence[Advert], mesh: MeshOptions, request: RecoveryRequest, me: PeerId, allowed: PeerRules
) -> CandidateSearch:
    """Returns: the search over what the adverts offer. Raises: NoPeer if none of the peers that the request names is here."""
    profiles = profiles_from_adverts(adverts, card.id)
    surviving = frozenset(_surviving(profiles, request))
    problem = PlanInput(
        card=card,
        profiles=tuple(_as_usable(profile, request, surviving, allowed) for profile in profiles),
        network=Network.from_adverts(adverts),
        context=request.context,
        prompt_tokens=request.known,
        peers=named_peers(mesh, profiles),
        resident_only=True,
    )
    return CandidateSearch(problem, request, surviving, me)


def _surviving(profiles: Sequence[PeerProfile], request: RecoveryRequest) -> Iterator[int]:
    """A peer that started anew, or let go of the layers, has lost the KV even if nobody noticed yet."""
    gone = request.lost | request.avoid
    here = {profile.id: profile.holdings for profile in profiles if profile.id not in gone}
    for number, stage in enumerate(request.old.stages if request.old is not None else ()):
        if _serving(here.get(stage.peer, ()), stage.layers) is not None:
            yield number


def _serving(holdings: Sequence[Holding], layers: LayerRange) -> Holding | None:
    return next((held for held in holdings if held.state in _SERVING and layers in held.layers), None)


def _as_usable(profile: PeerProfile, request: RecoveryRequest, surviving: frozenset[int], allowed: PeerRules) -> PeerProfile:
    """What the session has reserved on the peer is free to it; the rest, if the peer may take more."""
    shut = (profile.id in request.avoid and not allowed.avoided) or (profile.draining and not allowed.leaving)
    free = [] if shut else [held for held in profile.holdings if allowed.standby or not held.standby]
    return msgspec.structs.replace(profile, holdings=(*free, *_own(profile, request, surviving, allowed)), draining=False)


def _own(profile: PeerProfile, request: RecoveryRequest, surviving: frozenset[int], allowed: PeerRules) -> Iterator[Holding]:
    if request.old is None:
        return
    avoided = allowed.avoided and profile.id in request.avoid - request.lost
    stages = [(number, stage) for number, stage in enumerate(request.old.stages) if stage.peer == profile.id]
    wanted = [stage.layers for number, stage in stages if avoided or number in surviving]
    wanted += [request.old.stages[number].layers for number, (peer, _) in request.copies.items() if peer == profile.id]
    for layers in wanted:
        held = _serving(profile.holdings, layers)
        if held is not None:
            yield msgspec.structs.replace(
                held, layers=layers, state="active", standby=False, kv_tokens_total=request.context, kv_tokens_free=request.context
            )
