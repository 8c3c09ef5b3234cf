"""What is asked of the planner, made of what a request says and what the live peers advertise."""

from collections.abc import Collection, Sequence
from contextlib import suppress

import msgspec

from meshd.agents.service import MeshOptions
from meshd.errors import NoPeer
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile, profiles_from_adverts
from meshd.planner.stages import parse_stages, resolve_peer
from meshd.types import Advert, ModelCard, Objective, PeerId

USUAL_CONTEXT = 16_384
"""KV is placed for this context at most, unless a request asks for more."""
LEAST_CONTEXT = 512
"""And for this one at least, however short memory is."""
CONTEXTS_OF_KV = 4
"""Whole contexts that a placement holds room for, where memory allows."""


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
    """The planner's question, from what the live peers advertise.

    `standby`: also layers that wait to take over; `leaving`: also peers that are about to leave. Raises: InvalidRequest, NoPeer.
    """
    profiles = tuple(_asked(profile, standby, leaving) for profile in profiles_from_adverts(adverts, card.id))
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


def repair_input(
    card: ModelCard, adverts: list[Advert], *, avoid: Collection[PeerId] = (), among: Collection[PeerId] | None = None
) -> PlanInput:
    """What is asked when layers are loaded beside what is there: of all peers but those in `avoid`, or of those in `among` only."""
    profiles = profiles_from_adverts(adverts, card.id)
    named = [profile.id for profile in profiles if (among is None or profile.id in among) and profile.id not in avoid]
    return PlanInput(
        card=card,
        profiles=profiles,
        network=Network.from_adverts(adverts),
        context=min(card.spec.context_length, USUAL_CONTEXT),
        peers=tuple(named),
    )


def named_peers(mesh: MeshOptions, profiles: Sequence[PeerProfile]) -> tuple[PeerId, ...] | None:
    """Those of the peers that the request names which are here; None: it names none. Raises: NoPeer if none of them is here."""
    if not mesh.peers:
        return None
    found: list[PeerId] = []
    for name in mesh.peers:
        with suppress(NoPeer):
            found.append(resolve_peer(name, profiles, param="mesh.peers"))
    if not found:
        raise NoPeer(f"not in the cluster now: {', '.join(mesh.peers)}", hint="see `meshd status`")
    return tuple(found)


def _asked(profile: PeerProfile, standby: bool, leaving: bool) -> PeerProfile:
    holdings = profile.holdings if standby else tuple(held for held in profile.holdings if not held.standby)
    return msgspec.structs.replace(profile, holdings=holdings, draining=profile.draining and not leaving)
