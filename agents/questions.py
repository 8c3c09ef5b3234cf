"""What is asked of the planner, made of what a request says and what the live peers advertise."""

from meshd.agents.service import MeshOptions
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import profiles_from_adverts
from meshd.planner.stages import parse_stages, resolve_peer
from meshd.types import Advert, ModelCard, Objective


def problem_of(
    card: ModelCard,
    adverts: list[Advert],
    mesh: MeshOptions,
    *,
    context: int,
    prompt_tokens: int | None = None,
    resident_only: bool = False,
) -> PlanInput:
    """The planner's question, from what the live peers advertise. Raises: InvalidRequest, NoPeer."""
    profiles = profiles_from_adverts(adverts, card.id)
    return PlanInput(
        card=card,
        profiles=profiles,
        network=Network.from_adverts(adverts),
        context=context,
        objective=mesh.objective or Objective.LATENCY,
        prompt_tokens=prompt_tokens or max(1, min(128, context // 2)),
        min_peers=mesh.min_peers or 1,
        peers=tuple(resolve_peer(name, profiles, param="mesh.peers") for name in mesh.peers) if mesh.peers else None,
        stages=parse_stages(mesh.stages, profiles, card.spec.layers) if mesh.stages else None,
        resident_only=resident_only,
    )
