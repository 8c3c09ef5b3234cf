"""Choose the cheapest stages for some or all layers of a running session, among the layers that are resident on peers.

A stage costs the time to recompute missing KV before the next token, plus its time for each of the tokens that are expected to
follow. Both times come from the formulas of `cost`.
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
from meshd.planner.session.cheapest_chain import CoverCosts, cover
from meshd.planner.session.pause import compute_s
from meshd.types import Holding, LayerRange, PeerId, StagePlan

_BACK_PEERS = 32
"""With more peers, the search ignores the link from the last stage to the first. It costs least and slows the search most."""


class HeldKv(NamedTuple):
    """KV of a session that a peer has: the first `positions` positions of some layers."""

    peer: PeerId
    layers: LayerRange
    positions: int


class Reroute:
    """Finds routes for one session.

    The problem's `prompt_tokens` is the number of tokens known so far, `tokens_ahead` the number expected to follow, and `held_kv`
    the KV that need not be recomputed.
    """

    def __init__(self, problem: PlanInput, tokens_ahead: int, held_kv: Iterable[HeldKv] = ()) -> None:
        excluded = exclusions(problem)
        peers = [profile for profile in problem.profiles if profile.id not in excluded]
        self.peers: tuple[PeerProfile, ...] = tuple(sorted(peers, key=lambda profile: (profile.name, profile.id)))
        self._problem, self._ahead, self._held_kv = problem, tokens_ahead, tuple(held_kv)
        self._tables = CostTables(problem, self.peers)

    def whole(self, *, under_way: bool = True) -> tuple[StagePlan, ...] | None:
        """Find the best route over all layers.

        `under_way`: True counts the time to recompute KV. False finds the best route of a session without KV to recompute.

        Returns: the stages; None if there is no route.
        """
        if not self.peers:
            return None
        stage, link = (self._stage, self._link) if under_way else (self._pace, self._hop)
        back = self._ahead * self._tables.back if len(self.peers) <= _BACK_PEERS else None
        return self._cover(CoverCosts(stage, link, back=back), 0)

    def fill(self, layers: LayerRange, before: PeerId | None, after: PeerId | None) -> tuple[StagePlan, ...] | None:
        """Find the best stages for these layers.

        `before` and `after` are the peers that compute the adjacent layers. If `layers` begins with the model's first layer,
        `before` is the peer of the last stage, from which the first stage receives tokens. If `layers` ends with the model's last
        layer, `after` is the peer of the first stage. None: the peer is not known, and its link costs nothing.

        Returns: the stages; None if there are none.
        """
        if not self.peers:
            return None
        cuts = slice(layers.start, layers.end + 1)
        first, last = layers.start == 0, layers.end == self._problem.card.spec.layers
        to_first = None if before is None else self._links_s(before, towards=True, token=first)
        from_last = None if after is None else self._links_s(after, towards=False, token=last)
        return self._cover(CoverCosts(self._stage[:, cuts, cuts], self._link, to_first, from_last), layers.start)

    def _cover(self, costs: CoverCosts, first: int) -> tuple[StagePlan, ...] | None:
        chain = cover(costs)
        return None if chain is None else chain.stages(self.peers, first)

    @cached_property
    def _pace(self) -> Array:
        """Seconds of a stage for all tokens ahead: `[peers, cuts, cuts]`."""
        pace: Array = self._ahead * self._tables.decode
        return pace

    @cached_property
    def _stage(self) -> Array:
        """`_pace` plus the seconds to recompute missing KV first: `[peers, cuts, cuts]`."""
        again = self._recompute_s(0)
        places = {peer.id: place for place, peer in enumerate(self.peers)}
        for kv in self._held_kv:
            place = places.get(kv.peer)
            if place is not None:
                part = slice(kv.layers.start, kv.layers.end + 1)
                less = self._recompute_s(min(kv.positions, self._problem.prompt_tokens - 1), self.peers[place])
                again[place, part, part] = np.minimum(again[place, part, part], less[0, part, part])
        return self._pace + again

    def _recompute_s(self, first: int, peer: PeerProfile | None = None) -> Array:
        """Predict the seconds to compute all known positions from `first` on, for `peer` or all peers: `[peers, cuts, cuts]`."""
        known = self._problem.prompt_tokens
        peers = self.peers if peer is None else (peer,)
        return range_sums(np.stack([compute_s(self._problem, one, first, known) for one in peers]))

    @cached_property
    def _hop(self) -> Array:
        """Seconds of a link for all tokens ahead: `[peers, peers]`."""
        hop: Array = self._ahead * self._tables.hop
        return hop

    @cached_property
    def _link(self) -> Array:
        """`_hop` plus the seconds to send the hidden states of all known tokens once: `[peers, peers]`."""
        link: Array = self._hop + self._tables.links(self._problem.prompt_tokens * self._problem.activation_bytes)
        return link

    def _links_s(self, other: PeerId, *, towards: bool, token: bool) -> Array:
        """Predict the seconds that the link between `other` and each peer adds: `[peers]`.

        `towards`: the link goes from `other` to the peer, otherwise from the peer to `other`. `token`: it carries the
        sampled tokens, otherwise the hidden states, first of all known tokens and then of each token ahead.
        """
        pairs = [(other, peer.id) if towards else (peer.id, other) for peer in self.peers]
        links = [self._problem.network.link(source, target) for source, target in pairs]
        if token:
            return self._ahead * np.array([link.hop_s(cost.TOKEN_MESSAGE_BYTES) for link in links])
        size = self._problem.activation_bytes
        return np.array([self._ahead * link.hop_s(size) + link.hop_s(size * self._problem.prompt_tokens) for link in links])


def reserve_all(problem: PlanInput, stages: Iterable[StagePlan]) -> PlanInput | None:
    """Return the problem after these stages have reserved their KV. None: the holdings lack KV for all of them together."""
    profiles = {profile.id: profile for profile in problem.profiles}
    for stage in stages:
        holdings = reserve_in(profiles[stage.peer].holdings, stage.layers, problem.context)
        if holdings is None:
            return None
        profiles[stage.peer] = msgspec.structs.replace(profiles[stage.peer], holdings=holdings)
    return msgspec.structs.replace(problem, profiles=tuple(profiles.values()))


def reserve_in(holdings: tuple[Holding, ...], layers: LayerRange, tokens: int) -> tuple[Holding, ...] | None:
    """Return the holdings after a stage has reserved KV in one of them. None: no holding has enough free KV.

    Of the holdings with enough free KV, the stage takes the one with the least.
    """
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
