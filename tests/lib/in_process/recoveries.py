"""Plans written as text, `a:0-10,b:10-20`, and the recovery of sessions that ran under them. The peer `a` has the id `a-id`."""

from collections.abc import Sequence
from typing import Any

import msgspec

from in_process.clusters import make_card, make_holding, make_peer
from in_process.placing import Cluster
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.resume import RecoveryPlan, RecoveryRequest
from meshd.numerics import NumericsId
from meshd.types import LayerRange, PeerId, Plan, PlanId, StagePlan

CARD = make_card()
"""A model of 30 layers."""
NO_OPTIONS = MeshOptions()


def stages_of(text: str) -> tuple[StagePlan, ...]:
    parts = (part.split(":") for part in text.split(","))
    return tuple(StagePlan(peer=PeerId(f"{name}-id"), layers=LayerRange.parse(layers)) for name, layers in parts)


def plan_of(text: str, *numerics: NumericsId) -> Plan:
    """Build a plan. `numerics`: of its stages, in order."""
    return Plan(
        id=PlanId("old"),
        model=CARD.id,
        stages=stages_of(text),
        prefill_chunk_tokens=128,
        context=512,
        predicted_tpot_s=0.01,
        numerics=numerics,
    )


def text_of(plan: Plan) -> str:
    return ",".join(f"{stage.peer.removesuffix('-id')}:{stage.layers}" for stage in plan.stages)


def ids(*names: str) -> frozenset[PeerId]:
    return frozenset(PeerId(f"{name}-id") for name in names)


def recovery_request(
    old: str | None, lost: frozenset[PeerId] = frozenset(), *, numerics: Sequence[NumericsId] = (), **fields: Any
) -> RecoveryRequest:
    """Build the recovery request of a session with 300 known tokens, 200 of them in the prompt, and a context of 512.

    `old`: the session's plan as text; None if it had none. `numerics`: of its stages.
    """
    given: dict[str, Any] = {"avoid": frozenset(), "prompt_tokens": 200, "max_tokens": 312, "known": 300}
    return RecoveryRequest(old=None if old is None else plan_of(old, *numerics), lost=lost, **given | fields)


async def recover(cluster: Cluster, request: RecoveryRequest, mesh: MeshOptions = NO_OPTIONS) -> RecoveryPlan:
    """Find a plan, and check that its stages have every layer exactly once."""
    found = await cluster.router.recover(CARD, mesh, request)
    assert [layer for stage in found.plan.stages for layer in stage.layers] == list(CARD.layers)
    return found


def three_peers(*more: Any, **fields: Any) -> Cluster:
    """Make a cluster of a, b and c, which hold ten layers each, and of the peers in `more`."""
    peers = [make_peer(name, holdings=(make_holding(start, start + 10),)) for name, start in (("a", 0), ("b", 10), ("c", 20))]
    return Cluster(*peers, *more, **fields)


def fill_memory(cluster: Cluster, *names: str) -> None:
    """Leave these peers with too little memory to load layers."""
    for name in names:
        capability = cluster.adverts[PeerId(f"{name}-id")].capability
        cluster.change(name, capability=msgspec.structs.replace(capability, memory_free_bytes=10 << 20))
