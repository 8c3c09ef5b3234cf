"""Which peer coordinates a session and which peers run its stages, read from the session rows of all peers."""

from typing import Any

Rows = dict[str, list[dict[str, Any]]]
"""The session rows of each peer, by the peer's name."""


def has_part(row: dict[str, Any], *, coordinator: bool) -> bool:
    """Return whether the row's peer coordinates the session, or with `coordinator=False` whether it runs a stage."""
    return bool(row["role"] == "coordinator" if coordinator else row["role"].startswith("stage"))


def sessions_hit(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return the sessions of one peer: id -> whether the peer coordinates the session."""
    computed = {row["id"]: False for row in rows if has_part(row, coordinator=False)}
    return computed | {row["id"]: True for row in rows if has_part(row, coordinator=True)}


def choose_victim(sessions: Rows, pick: float, *, coordinator: bool) -> str:
    """Choose a peer that coordinates a session (`coordinator` is True) or runs a stage (False); any peer if there is none.

    Of the peers with a stage, those that coordinate no session are preferred, because the loss of a stage is to be measured.
    """
    fitting = [name for name, rows in sessions.items() if any(has_part(row, coordinator=coordinator) for row in rows)]
    if not coordinator:
        fitting = [name for name in fitting if not any(has_part(row, coordinator=True) for row in sessions[name])] or fitting
    candidates = fitting or sorted(sessions)
    return candidates[int(pick * len(candidates))]


def coordinators_outside(sessions: Rows, names: set[str]) -> bool:
    """Return whether a peer other than these coordinates a session."""
    return any(has_part(row, coordinator=True) for name, rows in sessions.items() if name not in names for row in rows)


def possible_moves(sessions: Rows, peers: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return the moves (coordinator, session, source, target) for which the target already has the source's layers.

    `peers` are the rows of `/mesh/v1/peers` at one peer. The target must not have a stage of the session yet.
    """
    resident = {
        row["name"]: [_layer_range(holding["layers"]) for holding in row["holdings"] if holding["state"] == "active"]
        for row in peers
        if row["name"] in sessions
    }
    return [
        (name, row["id"], source, target)
        for name, rows in sessions.items()
        for row in rows
        if has_part(row, coordinator=True) and row["state"] == "decoding"
        for source, _, layers in (part.partition(":") for part in row["plan"].split(","))
        for target, ranges in sorted(resident.items())
        if f"{target}:" not in row["plan"] and any(set(_layer_range(layers)) <= set(layer_range) for layer_range in ranges)
    ]


def _layer_range(layers: str) -> range:
    start, _, end = layers.partition("-")
    return range(int(start), int(end))
