"""What came of a chaos run: pauses by kind of fault, answers against the fault-free ones, and what was left behind."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from chaos.clients import Asked
from chaos.faults import Struck
from chaos.schedule import Kind
from real_daemons.mesh import Host, Mesh
from real_daemons.streams import quantile

_AFTER_S = 5.0
"""A pause that begins this soon after a fault is over still counts as its own."""
_RSS_SLACK = 1.25
_SOCKETS_ROOM = 2
"""A client of the API may be connected while we count."""


def pause_s(asked: Asked, struck: Struck) -> float | None:
    """The longest wait for the next token that this fault can have caused; None if the answer was over before it."""
    times = asked.answer.times
    if not asked.answer.ended or not times or times[-1] <= struck.at:
        return None
    edges = [max(asked.answer.asked_at, struck.at), *times] if times[0] > struck.at else times
    gaps = [
        later - max(earlier, struck.at)
        for earlier, later in pairwise(edges)
        if later > struck.at and earlier < struck.over_at + _AFTER_S
    ]
    return max(gaps, default=None)


def table(struck: Sequence[Struck], ended: Iterable[Asked]) -> list[str]:
    """Fault kind, how often, the answers that it hit, as a stage's peer or as their coordinator, and their pauses.

    The second kind waits for its client too, which turns to another peer after a while.
    """
    by_session = {asked.answer.session: asked for asked in ended}
    lines = [f"{'fault':24} {'count':>5}  {'it hit':16} {'answers':>7} {'pause p50':>10} {'p99':>8} {'longest':>8}  went on by"]
    for kind in Kind:
        of_kind = [one for one in struck if one.fault.kind is kind]
        for coordinator in (False, True):
            hit = [(one, session) for one in of_kind for session, was in one.hit.items() if was is coordinator]
            if not hit and (coordinator or not of_kind):
                continue
            found = [pause_s(by_session[session], one) for one, session in hit if session in by_session]
            pauses = [pause for pause in found if pause is not None]
            shown = f"{_quantile(pauses, 0.5)} {_quantile(pauses, 0.99, 8)} {_quantile(pauses, 1, 8)}"
            sessions = {session for _, session in hit} & set(by_session)
            methods = Counter(method for session in sessions for method in by_session[session].methods)
            how = ", ".join(f"{method} {count}" for method, count in sorted(methods.items()))
            what = "its coordinator" if coordinator else "a stage"
            lines.append(f"{kind.value:24} {len(of_kind):5}  {what:16} {len(hit):7} {shown}  {how}")
    return lines


def longest(struck: Sequence[Struck], ended: Iterable[Asked], count: int) -> list[tuple[float, Struck, Asked]]:
    """The longest pauses; of faults that came close together, each gets the blame."""
    by_session = {asked.answer.session: asked for asked in ended}
    found = [
        (pause, one, by_session[session])
        for one in struck
        for session in set(one.hit) & set(by_session)
        if (pause := pause_s(by_session[session], one)) is not None
    ]
    return sorted(found, key=lambda row: -row[0])[:count]


def _quantile(values: Sequence[float], share: float, width: int = 10) -> str:
    if not values:
        return f"{'-':>{width}}"
    return f"{quantile(values, share):{width - 2}.2f} s"


def usual_gap_s(ended: Iterable[Asked]) -> float:
    """The median time between two tokens, faults or not."""
    gaps = [later - earlier for asked in ended for earlier, later in pairwise(asked.answer.times)]
    return statistics.median(gaps) if gaps else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One daemon at rest."""

    sessions: int
    kv_tokens_held: int
    blocks_free: float
    sockets: int
    resident_bytes: int
    loads: tuple[str, ...]
    layers: int
    """Of all loads together."""

    def __str__(self) -> str:
        return (
            f"{self.sessions} sessions, {self.kv_tokens_held} KV tokens held, {self.blocks_free:.0f} blocks free, "
            f"{self.sockets} sockets, {self.resident_bytes / 2**20:.0f} MiB, layers {', '.join(self.loads) or '-'}"
        )


def read(host: Host) -> Reading:
    """Raises: OSError, HTTPException, MeshBroken."""
    own = next(row for row in host.rows("peers") if row["name"] == host.name)
    loads = tuple(sorted(str(held["layers"]) for held in own["holdings"]))
    metrics = host.get("/metrics").splitlines()
    blocks = next((float(line.split()[1]) for line in metrics if line.startswith("meshd_kv_blocks_free ")), 0.0)
    return Reading(
        sessions=len(host.rows("sessions")),
        kv_tokens_held=sum(held["kv_tokens_total"] - held["kv_tokens_free"] for held in own["holdings"]),
        blocks_free=blocks,
        sockets=host.sockets(),
        resident_bytes=host.resident_bytes(),
        loads=loads,
        layers=sum(int(end) - int(start) for start, _, end in (load.partition("-") for load in loads)),
    )


def read_all(mesh: Mesh) -> dict[str, Reading]:
    return {host.name: read(host) for host in mesh}


def leaks(calm: dict[str, Reading], now: dict[str, Reading]) -> list[str]:
    """What is left that should not be. Any peer may hold any layers by now, so memory is held against that of one at the calm start

    with nothing loaded, and what each layer took there at most.
    """
    empty = min(reading.resident_bytes for reading in calm.values())
    per_layer = max(((reading.resident_bytes - empty) // reading.layers for reading in calm.values() if reading.layers), default=0)
    sockets = max(reading.sockets for reading in calm.values())
    told = []
    for name, reading in now.items():
        told += [f"{name} has {reading.sessions} sessions left"] * bool(reading.sessions)
        told += [f"{name} holds {reading.kv_tokens_held} KV tokens for nobody"] * bool(reading.kv_tokens_held)
        if reading.sockets > sockets + _SOCKETS_ROOM:
            told.append(f"{name} has {reading.sockets} sockets open, {sockets} at the calm start")
        fair = empty + per_layer * reading.layers
        if reading.resident_bytes > fair * _RSS_SLACK:
            told.append(f"{name} takes {reading.resident_bytes / 2**20:.0f} MiB; by the calm start {fair / 2**20:.0f} MiB are fair")
    return told
