"""`meshd status`: show peers, the layers each holds, links and sessions."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from meshd.cli.support.arguments import Parser, add_client, add_json
from meshd.cli.support.client import Daemon, daemon_of
from meshd.cli.support.output import print_json, show, table
from meshd.display import ABSENT, LINK_HEADERS, duration, flops, link_cells, plural, rate, recovered, short_id, size

EXAMPLE = "meshd status\n  meshd status --watch\n  meshd status --json"
LISTS = ("peers", "links", "models", "sessions")
Row = Mapping[str, Any]


def add_arguments(parser: Parser) -> None:
    add_json(parser)
    parser.add_argument(
        "--watch",
        action="store_true",
        help="draw it again whenever something changes; off a terminal, print what happens, a line each (with --json: as JSON)",
    )
    add_client(parser)


def run(args: Namespace) -> int:
    daemon = daemon_of(args)
    if args.watch:
        _watch(daemon, as_json=args.json)
        return 0
    status = collect(daemon)
    if args.json:
        print_json(status)
    else:
        show(render(status))
    return 0


def _watch(daemon: Daemon, *, as_json: bool) -> None:
    """Show the status until interrupted."""
    from meshd.cli.support.watching import print_events, redraw

    def status() -> str:
        return render(collect(daemon))

    if sys.stdout.isatty() and not as_json:
        redraw(daemon, status)
    else:
        print_events(daemon, status, as_json=as_json)


def collect(daemon: Daemon) -> dict[str, Any]:
    """Collect what `--json` prints: `self`, and the rows of each list in LISTS."""
    return {"self": daemon.get("/mesh/v1/self")} | {name: daemon.rows(f"/mesh/v1/{name}") for name in LISTS}


def render(status: Mapping[str, Any]) -> str:
    """Format the status as text."""
    models = {row["id"]: row["name"] for row in status["models"]}
    parts = [
        _headline(status["self"], status["peers"]),
        _peers(status["peers"], status["self"]["id"], models),
        links_table(status["links"]) if status["links"] else "",
        _sessions(status["sessions"]) if status["sessions"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def links_table(rows: Sequence[Row]) -> str:
    """Format links: one line per measured direction."""
    return table(LINK_HEADERS, map(link_cells, rows))


def _headline(own: Row, peers: Sequence[Row]) -> str:
    alive = sum(row["state"] == "alive" for row in peers)
    lines = [
        f"{own['name']} ({short_id(own['id'])}), meshd {own['version']}, up {duration(own['uptime_s'])}",
        f"cluster {own['cluster']}: {plural(alive, 'peer')} alive; API {own['api']}, links {own['link']}",
    ]
    lines += ["notice: " + "; ".join(filter(None, (notice["message"], notice["hint"]))) for notice in own["notices"]]
    return "\n".join(lines)


def _peers(rows: Sequence[Row], me: str, models: Mapping[str, str]) -> str:
    headers = ("PEER", "ID", "STATE", "ADDRESS", "BACKEND", "DECODE", "PREFILL", "MEMORY FREE", "HOLDS")
    lines = [table(headers, (_peer(row, me, models) for row in rows))]
    lines += [_trouble(row) for row in rows if row["reason"]]
    if any(row.get("trouble") for row in rows):
        lines.append("`meshd doctor` checks this device and its connections, and says what to type")
    return "\n".join(lines)


def _trouble(row: Row) -> str:
    """Say what is wrong with a peer and, if that is known, what to do."""
    said = row["reason"] if row["state"] in ("alive", "other cluster") else f"left out ({row['state']}): {row['reason']}"
    return f"{row['name']}: " + "; ".join(filter(None, (said, row.get("hint", ""))))


def _peer(row: Row, me: str, models: Mapping[str, str]) -> tuple[str, ...]:
    known = (
        row["name"] + (" (this)" if row["id"] == me else ""),
        short_id(row["id"]) or ABSENT,
        row["state"] + (", draining" if row.get("draining") else ""),
        ",".join(row["addresses"]) or ABSENT,
    )
    holds = ", ".join(_holding(held, models) for held in row["holdings"]) or ABSENT
    capability = row["capability"]
    if not capability:
        return (*known, ABSENT, ABSENT, ABSENT, ABSENT, holds)
    return (
        *known,
        f"{capability['backend']} x{capability['threads']}",
        rate(capability["rates"]["decode_bytes_s"]),
        flops(capability["rates"]["prefill_flops_s"]),
        f"{size(capability['memory_free_bytes'])} of {size(capability['memory_total_bytes'])}",
        holds,
    )


def _holding(held: Row, models: Mapping[str, str]) -> str:
    name = models.get(held["model"], short_id(held["model"]))
    ready = "standby" if held.get("standby") else ""
    doing = {"warm": ready, "active": ready, "loading": f"loading {100 * held['progress']:.0f} %"}
    state = doing.get(held["state"], held["state"])
    return f"{name} {held['layers']}" + (f" ({state})" if state else "")


def _sessions(rows: Sequence[Row]) -> str:
    headers = ("SESSION", "ROLE", "MODEL", "STATE", "TOKENS", "PLAN", "MIRRORED", "RECOVERED")
    return table(headers, map(_session, rows))


def _session(row: Row) -> tuple[str, ...]:
    known = (str(row.get(key) or ABSENT) for key in ("id", "role", "model", "state", "tokens", "plan"))
    mirrors = ", ".join(f"stage {copy['stage']} at {copy['name']}" for copy in row.get("mirrors", ()))
    return (*known, mirrors or ABSENT, recovered(row.get("recoveries", ())))
