"""Stages as people write them: `a:0-12,b:12-30`."""

from collections.abc import Sequence

from meshd.errors import InvalidRequest, NoPeer
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.planner.shards import check_shards
from meshd.types import LayerRange, PeerId, StagePlan


def parse_stages(text: str, profiles: Sequence[PeerProfile], layers: int) -> tuple[StagePlan, ...]:
    """Parse stages. A peer is given by its name or an unambiguous beginning of its id; layers are half-open.

    Raises: InvalidRequest (grammar, gap, overlap, out of range, the same peer twice), NoPeer.
    """
    stages = tuple(_parse_stage(part.strip(), profiles) for part in text.split(","))
    check_cover(stages, layers)
    return stages


def stages_text(stages: Sequence[StagePlan], profiles: Sequence[PeerProfile]) -> str:
    """`name:0-12,name:12-30`; a peer without a profile is shown by the beginning of its id."""
    names = {profile.id: profile.name for profile in profiles}
    return ",".join(f"{names.get(stage.peer, stage.peer[:8])}:{stage.layers}" for stage in stages)


def resolve_peer(text: str, profiles: Sequence[PeerProfile], *, param: str = "stages") -> PeerId:
    """Find the peer with this name, id or beginning of an id. Raises: NoPeer; InvalidRequest if several match."""
    named = [profile for profile in profiles if text in (profile.name, profile.id)]
    matches = named or [profile for profile in profiles if text and profile.id.startswith(text)]
    if len(matches) == 1:
        return matches[0].id
    if matches:
        ids = ", ".join(f"{profile.name} ({profile.id[:8]})" for profile in matches)
        raise InvalidRequest(f"{text!r} means several peers: {ids}", param=param, hint="write more of the id")
    known = ", ".join(sorted(profile.name for profile in profiles)) or "none"
    raise NoPeer(f"no peer is called {text!r}: the peers here are {known}", hint="see `meshd status`")


def check_cover(stages: Sequence[StagePlan], layers: int) -> None:
    """Check that the stages have every layer once, in order, and no peer twice. Raises: InvalidRequest."""
    reached = 0
    seen: set[PeerId] = set()
    for stage in stages:
        span = stage.layers
        if not 0 <= span.start < span.end <= layers:
            raise _wrong(f"layers {span} are out of range: the model has layers 0-{layers}")
        if span.start != reached:
            kind = "gap" if span.start > reached else "overlap"
            low, high = sorted((reached, span.start))
            raise _wrong(f"{kind} at layers {low}-{high}: a stage begins where the last one ends")
        if stage.peer in seen:
            raise _wrong(f"peer {stage.peer[:8]} has two stages: a peer takes one run of layers")
        seen.add(stage.peer)
        reached = span.end
    if reached != layers:
        raise _wrong(f"gap at layers {reached}-{layers}: nothing computes them")


def check_stages(stages: Sequence[StagePlan], problem: PlanInput) -> None:
    """Check stages against the question: cover, peers, attention shards; not memory.

    Raises: InvalidRequest, NoPeer.
    """
    check_cover(stages, problem.card.spec.layers)
    if len(stages) < problem.min_peers:
        raise InvalidRequest(f"stages name {len(stages)} peers and min_peers asks for {problem.min_peers}", param="stages")
    for peer in (peer for stage in stages for peer in (stage.peer, *(shard.peer for shard in stage.attention))):
        profile = problem.profile(peer)
        if problem.peers is not None and peer not in problem.peers:
            raise InvalidRequest(f"stages use {profile.name}, which `peers` leaves out", param="stages")
        if not profile.measured:
            raise NoPeer(f"the rates of {profile.name} are not measured yet", hint="try again in a few seconds")
        if profile.draining:
            raise NoPeer(f"{profile.name} is about to leave and takes no new work", hint="name another peer")
    for stage in stages:
        check_shards(stage, problem.card.spec, problem.context)


def _parse_stage(part: str, profiles: Sequence[PeerProfile]) -> StagePlan:
    peer, colon, layers = part.rpartition(":")
    if not colon or not peer:
        raise _wrong(f"{part!r} is no stage like name:0-12")
    try:
        span = LayerRange.parse(layers)
    except ValueError as error:
        raise _wrong(f"{part!r} is no stage like name:0-12: {layers!r} is no layer range") from error
    return StagePlan(peer=resolve_peer(peer.strip(), profiles), layers=span)


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="stages", hint="write for example a:0-12,b:12-30")
