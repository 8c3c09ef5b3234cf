"""The cheapest stages for layers of a running session, over resident layers.

A stage costs the time to recompute KV before the next token, plus its part of every token that is expected to follow.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np

from meshd.planner.chain import Array
from meshd.planner.eligible import exclusions
from meshd.planner.model import cost
from meshd.planner.model.tables import CostTables, range_sums
from meshd.planner.problem import PlanInput
from meshd.planner.profile import USABLE_STATE, PeerProfile
from meshd.planner.session.cover import CoverCosts, cover
from meshd.planner.session.pause import compute_s
from meshd.types import Holding, LayerRange, PeerId, StagePlan

STAGE_S = 400e-6
"""Cost of a stage at each token beside its layers and its link, since two threads are woken for it: half of the 0.8 ms that
`bench_split.py` shows for a second stage, so that it decides only between plans that are close."""
_BACK_PEERS = 32
"""Among more peers the token's way back is left out of the search: it is the smallest term and the most expensive one."""


class HeldKv(NamedTuple):
    """KV of a session on a peer: the first `positions` positions of some layers."""

    peer: PeerId
    layers: LayerRange
    positions: int


class Reroute:
    """Routes for one question, whose `prompt_tokens` are the tokens known so far."""

    def __init__(self, problem: PlanInput, tokens_ahead: int, held_kv: Iterable[HeldKv] = ()) -> None:
        excluded = exclusions(problem)
        peers = [profile for profile in problem.profiles if profile.id not in excluded]
        self.peers: tuple[PeerProfile, ...] = tuple(sorted(peers, key=lambda profile: (profile.name, profile.id)))
        self._problem, self._ahead, self._held_kv = problem, tokens_ahead, tuple(held_kv)
        self._tables = CostTables(problem, self.peers)

    def whole(self, *, under_way: bool = True) -> tuple[StagePlan, ...] | None:
        """Find the best route over all layers; with `under_way` False, as if nothing had to be recomputed."""
        if not self.peers:
            return None
        stage, link = (self._stage, self._link) if under_way else (self._pace, self._hop)
        back = self._ahead * self._tables.back if len(self.peers) <= _BACK_PEERS else None
        return self._cover(CoverCosts(stage, link, back=back), 0)

    def fill(self, layers: LayerRange, before: PeerId | None, after: PeerId | None) -> tuple[StagePlan, ...] | None:
        """Find the best cover of these layers between the peers `before` and `after`, which compute the adjacent layers.

        At the model's ends these are the peers of the last and the first stage, for the token's way back. None: unknown.
        """
        if not self.peers:
            return None
        cuts = slice(layers.start, layers.end + 1)
        first, last = layers.start == 0, layers.end == self._problem.card.spec.layers
        to_first = None if before is None else self._ways(before, towards=True, token=first)
        from_last = None if after is None else self._ways(after, towards=False, token=last)
        return self._cover(CoverCosts(self._stage[:, cuts, cuts], self._link, to_first, from_last), layers.start)

    def _cover(self, costs: CoverCosts, first: int) -> tuple[StagePlan, ...] | None:
        chain = cover(costs)
        return None if chain is None else chain.stages(self.peers, first)

    @cached_property
    def _pace(self) -> Array:
        """Seconds of a stage for the tokens ahead: `[peers, cuts, cuts]`."""
        pace: Array = self._ahead * (self._tables.decode + STAGE_S)
        return pace

    @cached_property
    def _stage(self) -> Array:
        """`_pace`, and the time to recompute KV first."""
        again = self._computed(0)
        places = {peer.id: place for place, peer in enumerate(self.peers)}
        for kv in self._held_kv:
            place = places.get(kv.peer)
            if place is not None:
                part = slice(kv.layers.start, kv.layers.end + 1)
                less = self._computed(min(kv.positions, self._problem.prompt_tokens - 1), self.peers[place])
                again[place, part, part] = np.minimum(again[place, part, part], less[0, part, part])
        return self._pace + again

    def _computed(self, first: int, peer: PeerProfile | None = None) -> Array:
        known = self._problem.prompt_tokens
        peers = self.peers if peer is None else (peer,)
        return range_sums(np.stack([compute_s(self._problem, one, first, known) for one in peers]))

    @cached_property
    def _hop(self) -> Array:
        hop: Array = self._ahead * self._tables.hop
        return hop

    @cached_property
    def _link(self) -> Array:
        """`_hop`, and the hidden states of all known tokens once."""
        link: Array = self._hop + self._tables.links(self._problem.prompt_tokens * self._problem.activation_bytes)
        return link

    def _ways(self, other: PeerId, *, towards: bool, token: bool) -> Array:
        """Link costs between `other` and each peer: from it (`towards` them) or to it, for tokens or hidden states."""
        pairs = [(other, peer.id) if towards else (peer.id, other) for peer in self.peers]
        links = [self._problem.network.link(source, target) for source, target in pairs]
        if token:
            return self._ahead * np.array([link.hop_s(cost.TOKEN_MESSAGE_BYTES) for link in links])
        size = self._problem.activation_bytes
        return np.array([self._ahead * link.hop_s(size) + link.hop_s(size * self._problem.prompt_tokens) for link in links])


def reserve_all(problem: PlanInput, stages: Iterable[StagePlan]) -> PlanInput | None:
    """The question after these stages reserved their KV; None if there is no room for all of them at once."""
    profiles = {profile.id: profile for profile in problem.profiles}
    for stage in stages:
        holdings = reserve_in(profiles[stage.peer].holdings, stage.layers, problem.context)
        if holdings is None:
            return None
        profiles[stage.peer] = msgspec.structs.replace(profiles[stage.peer], holdings=holdings)
    return msgspec.structs.replace(problem, profiles=tuple(profiles.values()))


def reserve_in(holdings: tuple[Holding, ...], layers: LayerRange, tokens: int) -> tuple[Holding, ...] | None:
    """The holdings after a stage reserved its KV in the fullest one that has room; None if none has."""
    fitting = [
        holding
        for holding in holdings
        if holding.state == USABLE_STATE and layers in holding.layers and holding.kv_tokens_free >= tokens
    ]
    if not fitting:
        return None
    chosen = min(fitting, key=lambda holding: holding.kv_tokens_free)
    left = msgspec.structs.replace(chosen, kv_tokens_free=chosen.kv_tokens_free - tokens)
    return tuple(left if holding is chosen else holding for holding in holdings)
