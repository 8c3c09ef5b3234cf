"""`meshd debug story SESSION`: show a session's events in order, collected from all peers."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from meshd.cli.support.arguments import Parser, add_client, add_commands, add_json
from meshd.cli.support.client import daemon_of
from meshd.cli.support.output import print_json, show, table
from meshd.display import short_id
from meshd.types import is_peer_id

EXAMPLE = "meshd debug story 10d4a1b2"
Row = Mapping[str, Any]
_COLUMN_KEYS = ("at_s", "peer", "name", "what")


def add_arguments(parser: Parser) -> None:
    text = "show a session's events in order, collected from all peers"
    story = add_commands(parser, {"story": text}, EXAMPLE)["story"]
    story.add_argument(
        "session",
        metavar="SESSION",
        help="the session's id or its answer's id; for a running session its first characters are enough",
    )
    add_json(story)
    add_client(story)


def run(args: Namespace) -> int:
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
