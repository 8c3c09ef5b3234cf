"""Parse, format and check stages. People write them as `a:0-12,b:12-30`."""

from collections import Counter
from collections.abc import Sequence

from meshd.errors import InvalidRequest, NoPeer
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.planner.shards import check_shards
from meshd.types import LayerRange, PeerId, StagePlan


def parse_stages(text: str, profiles: Sequence[PeerProfile], layers: int) -> tuple[StagePlan, ...]:
    """Parse stages. A peer is given by its name or an unambiguous prefix of its id; layer ranges are half-open.

    Raises: InvalidRequest for a syntax error, a gap, an overlap, a range beyond the model, or a peer with two stages; NoPeer.
    """
    stages = tuple(_parse_stage(part.strip(), profiles) for part in text.split(","))
    check_cover(stages, layers)
    return stages


def with_ids(text: str, profiles: Sequence[PeerProfile]) -> str:
    """Replace the names of peers in a list of stages by their ids. What names no peer stays as it is.

    Raises: InvalidRequest if several peers match a name.
    """
    parts = [part.strip().rpartition(":") for part in text.split(",")]
    return ",".join(f"{id_of(name, profiles)}{colon}{layers}" for name, colon, layers in parts)


def id_of(text: str, profiles: Sequence[PeerProfile], *, param: str = "stages") -> str:
    """Return the id of the peer that `text` names; `text` if it names none. Raises: InvalidRequest if several peers match."""
    try:
        return resolve_peer(text, profiles, param=param)
    except NoPeer:
        return text


def stages_text(stages: Sequence[StagePlan], profiles: Sequence[PeerProfile]) -> str:
    """Format stages as `name:0-12,name:12-30`.

    A peer without a profile, or with a name that another peer has too, is shown by the first characters of its id.
    """
    known = Counter(profile.name for profile in profiles)
    names = {profile.id: profile.name for profile in profiles if known[profile.name] == 1}
    return ",".join(f"{names.get(stage.peer, stage.peer[:8])}:{stage.layers}" for stage in stages)


def resolve_peer(text: str, profiles: Sequence[PeerProfile], *, param: str = "stages") -> PeerId:
    """Find the peer by its id, its name or a prefix of its id. Raises: NoPeer if none matches; InvalidRequest if several match."""
    exact = [profile for profile in profiles if text == profile.id] or [profile for profile in profiles if text == profile.name]
    matches = exact or [profile for profile in profiles if text and profile.id.startswith(text)]
    if len(matches) == 1:
        return matches[0].id
    if matches:
        ids = ", ".join(f"{profile.name} ({profile.id[:8]})" for profile in matches)
        raise InvalidRequest(f"{text!r} matches several peers: {ids}", param=param, hint="write more characters of the id")
    known = ", ".join(sorted(profile.name for profile in profiles)) or "none"
    raise NoPeer(f"no peer is called {text!r}: the peers here are {known}", hint="see `meshd status`")


def check_cover(stages: Sequence[StagePlan], layers: int) -> None:
    """Check that the stages cover every layer once and in order, and that no peer has two stages. Raises: InvalidRequest."""
    reached = 0
    seen: set[PeerId] = set()
    for stage in stages:
        span = stage.layers
        if not 0 <= span.start < span.end <= layers:
            raise _wrong(f"layers {span} are out of range: the model has layers 0-{layers}")
        if span.start != reached:
            kind = "gap" if span.start > reached else "overlap"
            low, high = sorted((reached, span.start))
            raise _wrong(f"{kind} at layers {low}-{high}: each stage must begin where the previous one ends")
        if stage.peer in seen:
            raise _wrong(f"peer {stage.peer[:8]} has two stages: a peer takes one run of layers")
        seen.add(stage.peer)
        reached = span.end
    if reached != layers:
        raise _wrong(f"gap at layers {reached}-{layers}: no stage computes them")


def check_stages(stages: Sequence[StagePlan], problem: PlanInput) -> None:
    """Check stages against the problem: layers, peers and attention shards, but not memory.

    Raises: InvalidRequest; NoPeer if a peer is absent, unmeasured or about to leave.
    """
    check_cover(stages, problem.card.spec.layers)
    if len(stages) < problem.min_peers:
        raise InvalidRequest(f"the stages name {len(stages)} peers, but min_peers asks for {problem.min_peers}", param="stages")
    for peer in (peer for stage in stages for peer in (stage.peer, *(shard.peer for shard in stage.attention))):
        profile = problem.profile(peer)
        if problem.peers is not None and peer not in problem.peers:
            raise InvalidRequest(f"the stages use {profile.name}, which `peers` does not name", param="stages")
        if not profile.measured:
            raise NoPeer(f"the rates of {profile.name} are not measured yet", hint="try again in a few seconds")
        if profile.draining:
            raise NoPeer(f"{profile.name} is about to leave and takes no new work", hint="name another peer")
    for stage in stages:
        check_shards(stage, problem.card.spec, problem.context)


def _parse_stage(part: str, profiles: Sequence[PeerProfile]) -> StagePlan:
    peer, colon, layers = part.rpartition(":")
    if not colon or not peer:
        raise _wrong(f"{part!r} is not a stage like name:0-12")
    try:
        span = LayerRange.parse(layers)
    except ValueError as error:
        raise _wrong(f"{part!r} is not a stage like name:0-12: {layers!r} is not a layer range") from error
    return StagePlan(peer=resolve_peer(peer.strip(), profiles), layers=span)


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="stages", hint="write for example a:0-12,b:12-30")
