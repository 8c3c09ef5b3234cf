"""`meshd debug story SESSION`: show a session's events in order, collected from all peers.

`meshd debug trace SESSION`: write when each peer computed the session's steps, for Perfetto or Chrome.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from meshd.cli.support.arguments import Parser, add_client, add_commands, add_json
from meshd.cli.support.client import daemon_of
from meshd.cli.support.output import print_json, show, table
from meshd.display import short_id
from meshd.errors import StorageError
from meshd.types import is_peer_id

EXAMPLE = "meshd debug story 10d4a1b2\n  meshd debug trace 10d4a1b2 -o answer.json"
Row = Mapping[str, Any]
_TRACE_S = 30.0
_COLUMN_KEYS = ("at_s", "unix_s", "peer", "name", "what")


def add_arguments(parser: Parser) -> None:
    texts = {
        "story": "show a session's events in order, collected from all peers",
        "trace": "write when each peer computed a session's steps, in Chrome's trace format (for ui.perfetto.dev)",
    }
    commands = add_commands(parser, texts, EXAMPLE)
    for command in commands.values():
        command.add_argument(
            "session",
            metavar="SESSION",
            help="the session's id or its answer's id; for a running session its first characters are enough",
        )
    add_json(commands["story"])
    commands["trace"].add_argument(
        "-o", "--output", metavar="FILE", help="where to write the trace (default: trace-SESSION.json; -: standard output)"
    )
    for command in commands.values():
        add_client(command)


def run(args: Namespace) -> int:
    return _trace(args) if args.command == "trace" else _story(args)


def _trace(args: Namespace) -> int:
    document = daemon_of(args).get(f"/mesh/v1/sessions/{quote(args.session, safe='')}/trace", timeout_s=_TRACE_S)
    about = document["otherData"]
    if args.output == "-":
        json.dump(document, sys.stdout)
        return 0
    path = Path(args.output or f"trace-{about['session'][:8]}.json")
    try:
        path.write_text(json.dumps(document))
    except OSError as error:
        raise StorageError(f"the trace can't be written to {path}: {error.strerror}", hint="name another file with -o") from error
    steps = sum(event["ph"] == "X" for event in document["traceEvents"])
    show(f"{path}: {steps} spans of {len(about['clocks'])} peers; open it at https://ui.perfetto.dev or chrome://tracing")
    for clock in about["clocks"]:
        older = f"; {clock['dropped']} older steps were not kept" if clock["dropped"] else ""
        show(f"  {clock['name']}: times within {1e3 * clock['error_s']:.3f} ms of {about['clock_of']}'s clock{older}")
    for name, why in about["no_trace_of"].items():
        show(f"  {name}: no trace: {why}")
    return 0


def _story(args: Namespace) -> int:
    rows = daemon_of(args).rows(f"/mesh/v1/sessions/{quote(args.session, safe='')}/story")
    if args.json:
        print_json({"object": "list", "data": rows})
    else:
        show(render(rows))
    return 0


def render(rows: Sequence[Row]) -> str:
    """Format the events: seconds since the first one, the reporting peer, and the event."""
    names = {row["peer"]: row["name"] for row in rows}
    return table(("TIME", "PEER", "WHAT"), ((f"{row['at_s']:.3f} s", row["name"], _what(row, names)) for row in rows))


def _what(row: Row, names: Mapping[str, str]) -> str:
    facts = ", ".join(
        f"{key} {_fact(value, names)}" for key, value in row.items() if key not in _COLUMN_KEYS and value not in ("", None)
    )
    return f"{row['what']}: {facts}" if facts else row["what"]


def _fact(value: object, names: Mapping[str, str]) -> str:
    """Format a value of an event on one line. Peer ids become names."""
    match value:
        case float():
            return f"{value:.6g}"
        case list():
            return "[" + "; ".join(_fact(part, names) for part in value) + "]"
        case dict():
            return " ".join(f"{key} {_fact(part, names)}" for key, part in value.items())
        case str() if is_peer_id(value):
            return names.get(value, short_id(value))
    return " ".join(str(value).split())
