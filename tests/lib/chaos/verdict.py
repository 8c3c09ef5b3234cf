"""The results of a chaos run: pauses by kind of fault, and leaks of sessions, KV, sockets and memory."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from chaos.clients import ClientRequest
from chaos.repairs import InjectedFault
from chaos.schedule import Kind
from real_daemons.mesh import Host, Mesh
from real_daemons.streams import quantile

_AFTER_S = 5.0
"""A pause that begins up to this many seconds after the end of a fault counts as caused by the fault."""
_RSS_SLACK = 1.25
_SOCKETS_SLACK = 2
"""Sockets above the highest count before the run that are no leak: an API client may be connected during the count."""


def pause_s(request: ClientRequest, injected: InjectedFault) -> float | None:
    """Return the longest wait for a token that the fault may have caused. None: the answer had ended before the fault."""
    times = request.answer.times
    if not request.answer.ended or not times or times[-1] <= injected.at:
        return None
    edges = [max(request.answer.asked_at, injected.at), *times] if times[0] > injected.at else times
    gaps = [
        later - max(earlier, injected.at)
        for earlier, later in pairwise(edges)
        if later > injected.at and earlier < injected.over_at + _AFTER_S
    ]
    return max(gaps, default=None)


def table(faults: Sequence[InjectedFault], ended: Iterable[ClientRequest]) -> list[str]:
    """Return the lines of a table: for each kind of fault, the number of faults, the number of answers hit, and the pauses.

    Answers that lost a stage and answers that lost their coordinator have separate lines. The pause after the loss of a coordinator
    includes the time until the client turns to another peer.
    """
    by_session = {request.answer.session: request for request in ended}
    lines = [f"{'fault':24} {'count':>5}  {'it hit':16} {'answers':>7} {'pause p50':>10} {'p99':>8} {'longest':>8}  continued by"]
    for kind in Kind:
        of_kind = [one for one in faults if one.fault.kind is kind]
        for coordinator in (False, True):
            hit = [(one, session) for one in of_kind for session, coordinates in one.hit.items() if coordinates is coordinator]
            if not hit and (coordinator or not of_kind):
                continue
            measured = [pause_s(by_session[session], one) for one, session in hit if session in by_session]
            pauses = [pause for pause in measured if pause is not None]
            shown = f"{_quantile(pauses, 0.5)} {_quantile(pauses, 0.99, 8)} {_quantile(pauses, 1, 8)}"
            sessions = {session for _, session in hit} & set(by_session)
            methods = Counter(method for session in sessions for method in by_session[session].methods)
            how = ", ".join(f"{method} {count}" for method, count in sorted(methods.items()))
            what = "its coordinator" if coordinator else "a stage"
            lines.append(f"{kind.value:24} {len(of_kind):5}  {what:16} {len(hit):7} {shown}  {how}")
    return lines


def longest(
    faults: Sequence[InjectedFault], ended: Iterable[ClientRequest], count: int
) -> list[tuple[float, InjectedFault, ClientRequest]]:
    """Return the `count` longest pauses. A pause that several faults may have caused is listed once for each of them."""
    by_session = {request.answer.session: request for request in ended}
    found = [
        (pause, one, by_session[session])
        for one in faults
        for session in set(one.hit) & set(by_session)
        if (pause := pause_s(by_session[session], one)) is not None
    ]
    return sorted(found, key=lambda row: -row[0])[:count]


def _quantile(values: Sequence[float], share: float, width: int = 10) -> str:
    if not values:
        return f"{'-':>{width}}"
    return f"{quantile(values, share):{width - 2}.2f} s"


def median_gap_s(ended: Iterable[ClientRequest]) -> float:
    """Return the median time between consecutive events, over all answers."""
    gaps = [later - earlier for request in ended for earlier, later in pairwise(request.answer.times)]
    return statistics.median(gaps) if gaps else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one daemon holds while no client uses the mesh."""

    sessions: int
    kv_tokens_held: int
    blocks_free: float
    sockets: int
    resident_bytes: int
    resident: tuple[str, ...]
    """The ranges of layers in memory, such as `0-17`."""
    layers: int
    """Number of layers in all these ranges."""

    def __str__(self) -> str:
        return (
            f"{self.sessions} sessions, {self.kv_tokens_held} KV tokens held, {self.blocks_free:.0f} blocks free, "
            f"{self.sockets} sockets, {self.resident_bytes / 2**20:.0f} MiB, layers {', '.join(self.resident) or '-'}"
        )


def read(host: Host) -> Reading:
    """Ask a daemon what it holds. Raises: OSError, HTTPException, MeshBroken."""
    own = next(row for row in host.rows("peers") if row["name"] == host.name)
    resident = tuple(sorted(str(holding["layers"]) for holding in own["holdings"]))
    metrics = host.get("/metrics").splitlines()
    blocks = next((float(line.split()[1]) for line in metrics if line.startswith("meshd_kv_blocks_free ")), 0.0)
    return Reading(
        sessions=len(host.rows("sessions")),
        kv_tokens_held=sum(holding["kv_tokens_total"] - holding["kv_tokens_free"] for holding in own["holdings"]),
        blocks_free=blocks,
        sockets=host.sockets(),
        resident_bytes=host.resident_bytes(),
        resident=resident,
        layers=sum(int(end) - int(start) for start, _, end in (layers.partition("-") for layers in resident)),
    )


def read_all(mesh: Mesh) -> dict[str, Reading]:
    return {host.name: read(host) for host in mesh}


def leaks(before: dict[str, Reading], after: dict[str, Reading]) -> list[str]:
    """Return a line for each leak of sessions, KV, sockets or memory.

    After the run, a peer may have other layers than before. Its memory may be 1.25 times what the smallest peer took before the
    run, plus for each of its layers the most that a layer took (also times 1.25).
    """
    empty = min(reading.resident_bytes for reading in before.values())
    loaded = [reading for reading in before.values() if reading.layers]
    per_layer = max(((reading.resident_bytes - empty) // reading.layers for reading in loaded), default=0)
    sockets = max(reading.sockets for reading in before.values())
    found = []
    for name, reading in after.items():
        found += [f"{name} has {reading.sessions} sessions left"] * bool(reading.sessions)
        found += [f"{name} holds {reading.kv_tokens_held} KV tokens for no session"] * bool(reading.kv_tokens_held)
        if reading.sockets > sockets + _SOCKETS_SLACK:
            found.append(f"{name} has {reading.sockets} sockets open; before the faults no peer had more than {sockets}")
        expected = empty + per_layer * reading.layers
        if reading.resident_bytes > expected * _RSS_SLACK:
            taken = f"{name} takes {reading.resident_bytes / 2**20:.0f} MiB"
            found.append(f"{taken}; by the readings before the faults {expected / 2**20:.0f} MiB are expected")
    return found
