"""Builds the planner's input from a request's options and the adverts of the live peers."""

from collections.abc import Collection, Sequence
from contextlib import suppress

import msgspec

from meshd.agents.service import MeshOptions
from meshd.errors import NoPeer
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile, profiles_from_adverts
from meshd.planner.stages import id_of, parse_stages, resolve_peer, with_ids
from meshd.types import Advert, ModelCard, ModelId, Objective, PeerId, is_peer_id

USUAL_CONTEXT = 16_384
"""Largest context, in tokens, to reserve KV for, unless a request asks for more."""
LEAST_CONTEXT = 512
"""Smallest context, in tokens, to reserve KV for. A placement that has no memory for it does not fit."""
ONE_NUMERICS_CONTEXT = 2048
"""Smallest context, in tokens, for which a placement on one numerics is preferred to a larger one over several. Most chats fit."""
CONTEXTS_OF_KV = 4
"""How many whole contexts a placement reserves KV for, if there is enough memory."""


def plan_input_of(
    card: ModelCard,
    adverts: list[Advert],
    mesh: MeshOptions,
    *,
    context: int,
    prompt_tokens: int | None = None,
    resident_only: bool = False,
    standby: bool = True,
    leaving: bool = False,
) -> PlanInput:
    """Build the input of a search for a placement or a route.

    `context` is the number of tokens to have KV for. `prompt_tokens` None means 128 or half the context. `resident_only` uses only
    loaded layers. `standby` includes standby copies; `leaving` includes draining peers.

    Raises: InvalidRequest, NoPeer.
    """
    prompt_tokens = prompt_tokens or max(1, min(128, context // 2))
    corrected = profiles_from_adverts(adverts, card.id, decode_at=(prompt_tokens + context) / 2, prompt_tokens=prompt_tokens)
    profiles = tuple(_restricted(profile, standby, leaving) for profile in corrected)
    return PlanInput(
        card=card,
        profiles=profiles,
        network=Network.from_adverts(adverts),
        context=context,
        objective=mesh.objective or Objective.LATENCY,
        prompt_tokens=prompt_tokens,
        min_peers=mesh.min_peers or 1,
        peers=tuple(resolve_peer(name, profiles, param="mesh.peers") for name in mesh.peers) if mesh.peers else None,
        stages=parse_stages(mesh.stages, profiles, card.spec.layers) if mesh.stages else None,
        resident_only=resident_only,
    )


def repair_input(
    card: ModelCard, adverts: list[Advert], *, avoid: Collection[PeerId] = (), among: Collection[PeerId] | None = None
) -> PlanInput:
    """Build the input of a search that adds layers to a placement.

    Only peers that are in `among` (None: all) and not in `avoid` may get new layers.
    """
    profiles = profiles_from_adverts(adverts, card.id)
    allowed = [profile.id for profile in profiles if (among is None or profile.id in among) and profile.id not in avoid]
    return PlanInput(
        card=card,
        profiles=profiles,
        network=Network.from_adverts(adverts),
        context=min(card.spec.context_length, USUAL_CONTEXT),
        peers=tuple(allowed),
    )


def with_peer_ids(mesh: MeshOptions, adverts: list[Advert], model: ModelId) -> MeshOptions:
    """Replace the names of peers by their ids. A peer that takes one of the names later then changes nothing for the answer.

    Raises: InvalidRequest if several peers have the name now.
    """
    profiles = profiles_from_adverts(adverts, model)
    return msgspec.structs.replace(
        mesh,
        stages=with_ids(mesh.stages, profiles) if mesh.stages else mesh.stages,
        peers=tuple(id_of(name, profiles, param="mesh.peers") for name in mesh.peers) if mesh.peers else mesh.peers,
    )


def named_peers(mesh: MeshOptions, profiles: Sequence[PeerProfile]) -> tuple[PeerId, ...] | None:
    """Resolve the peers that a request names. Skips names of peers that are not in the cluster now.

    Returns: None if the request names no peers.
    Raises: NoPeer if none of the named peers is in the cluster.
    """
    if not mesh.peers:
        return None
    found: list[PeerId] = []
    for name in mesh.peers:
        with suppress(NoPeer):
            found.append(resolve_peer(name, profiles, param="mesh.peers"))
    if not found:
        gone = ", ".join(name[:8] if is_peer_id(name) else name for name in mesh.peers)
        raise NoPeer(f"not in the cluster now: {gone}", hint="see `meshd status`")
    return tuple(found)


def _restricted(profile: PeerProfile, standby: bool, leaving: bool) -> PeerProfile:
    holdings = profile.holdings if standby else tuple(holding for holding in profile.holdings if not holding.standby)
    return msgspec.structs.replace(profile, holdings=holdings, draining=profile.draining and not leaving)
