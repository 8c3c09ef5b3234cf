"""Decide which peers may be in a plan, and why the others may not."""

from meshd.errors import InvalidRequest, NoPeer, NotReady
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.types import Objective, PeerId

_HOLDS_NOTHING = "it holds no layers of this model"


def exclusions(problem: PlanInput) -> dict[PeerId, str]:
    """Return the reason for each peer that may not take layers. Memory is not considered."""
    reasons = ((profile.id, _reason(problem, profile)) for profile in problem.profiles)
    return {peer: reason for peer, reason in reasons if reason}


def eligible(problem: PlanInput) -> tuple[PeerProfile, ...]:
    """Return the peers that may take layers, ordered by name, then id.

    Raises: NoPeer if a peer that the request names is absent, or if there are no eligible peers or fewer than `min_peers`; NotReady
    if there are enough peers, but too few of them hold layers yet; InvalidRequest if the model has fewer layers than `min_peers`,
    or if the objective is energy and the power of a peer was not measured.
    """
    named = set(problem.peers or ())
    absent = named - {profile.id for profile in problem.profiles}
    if absent:
        raise NoPeer(f"not in the cluster now: {', '.join(sorted(absent))}", hint="see `meshd status`")
    excluded = exclusions(problem)
    peers = [profile for profile in problem.profiles if profile.id not in excluded]
    _check_count(problem, len(peers), excluded)
    if problem.objective is Objective.ENERGY:
        check_power(peers)
    return tuple(sorted(peers, key=lambda profile: (profile.name, profile.id)))


def check_power(peers: list[PeerProfile]) -> None:
    """Check that the power of each peer was measured. Raises: InvalidRequest."""
    unknown = [peer.name for peer in peers if peer.power_w is None]
    if unknown:
        raise InvalidRequest(
            f"no plan for least energy: the power of {', '.join(unknown)} was not measured",
            param="objective",
            hint="ask for another objective, or name only measured peers in `peers`",
        )


def _check_count(problem: PlanInput, count: int, excluded: dict[PeerId, str]) -> None:
    if problem.min_peers > problem.card.spec.layers:
        raise InvalidRequest(
            f"min_peers is {problem.min_peers}: {problem.card.name} has only {problem.card.spec.layers} layers to share out",
            param="min_peers",
        )
    if count >= max(1, problem.min_peers):
        return
    if list(excluded.values()).count(_HOLDS_NOTHING) + count >= max(1, problem.min_peers):
        needed = max(1, problem.min_peers)
        raise NotReady(f"{problem.card.name} cannot answer yet: {needed} peers must hold layers of it, and {count} do so now")
    names = {profile.id: profile.name for profile in problem.profiles}
    why = "; ".join(f"{names[peer]}: {reason}" for peer, reason in excluded.items())
    raise NoPeer(
        f"{max(1, problem.min_peers)} peers are needed and {count} can take layers" + (f" ({why})" if why else ""),
        hint="start `meshd up` on another device",
    )


def _reason(problem: PlanInput, profile: PeerProfile) -> str:
    if problem.peers is not None and profile.id not in problem.peers:
        return "the request does not name it"
    if "compute" not in profile.roles:
        return "its role leaves out compute"
    if profile.draining:
        return "it is about to leave"
    if not profile.measured:
        return "its rates are not measured yet"
    if problem.resident_only and not profile.usable_holdings:
        return _HOLDS_NOTHING
    return ""
