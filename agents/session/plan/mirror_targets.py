"""Chooses the peers that keep copies of a session's KV. Pure: adverts in, a plan with mirrors out."""

import msgspec

from meshd.numerics import UNKNOWN, NumericsId
from meshd.planner.network import Network
from meshd.planner.profile import USABLE_STATE
from meshd.planner.session.reroute import reserve_in
from meshd.types import Advert, Holding, LayerRange, ModelId, PeerId, Plan

_MIRROR_BYTES = 1 << 20
"""Links are compared by the time of a KV transfer of this size."""


def mirror_targets(plan: Plan, adverts: list[Advert]) -> Plan:
    """Choose a mirror for each stage: another live peer that has the stage's layers and enough free KV.

    Peers with the stage's numerics are preferred, then those outside the plan, then those with the fastest link, then those with
    the most free KV. A mirror with other numerics serves only if no peer with the stage's own can take it over.

    Returns: the plan with its mirrors. A stage without a suitable peer has none.
    """
    network = Network.from_adverts(adverts)
    numerics_of: dict[PeerId, NumericsId] = {advert.peer: advert.capability.numerics for advert in adverts}
    holdings_of = {advert.peer: active_holdings(advert, plan.model) for advert in adverts if not advert.draining}
    for stage in plan.stages:
        _reserve(holdings_of, stage.peer, stage.layers, plan.context)
    stages = []
    for number, stage in enumerate(plan.stages):
        fitting = [
            (
                plan.numerics_of(number) not in (UNKNOWN, numerics_of[peer]),
                peer in plan.peers,
                network.hop_s(stage.peer, peer, _MIRROR_BYTES),
                -sum(holding.kv_tokens_free for holding in holdings),
                peer,
            )
            for peer, holdings in holdings_of.items()
            if peer != stage.peer and reserve_in(holdings, stage.layers, plan.context) is not None
        ]
        mirror = min(fitting)[-1] if fitting else None
        if mirror is not None:
            _reserve(holdings_of, mirror, stage.layers, plan.context)
        stages.append(msgspec.structs.replace(stage, mirror=mirror))
    return msgspec.structs.replace(plan, stages=tuple(stages))


def _reserve(holdings_of: dict[PeerId, tuple[Holding, ...]], peer: PeerId, layers: LayerRange, tokens: int) -> None:
    left = reserve_in(holdings_of.get(peer, ()), layers, tokens)
    if left is not None:
        holdings_of[peer] = left


def active_holdings(advert: Advert, model: ModelId) -> tuple[Holding, ...]:
    """Return a peer's holdings of a model that can serve now."""
    return tuple(holding for holding in advert.holdings if holding.model == model and holding.state == USABLE_STATE)
