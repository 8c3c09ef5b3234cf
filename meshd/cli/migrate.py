"""`meshd migrate SESSION PEER`: move a running session to another peer without ending it."""

from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_client
from meshd.cli.support.client import STREAM_SILENCE_S, daemon_of
from meshd.cli.support.output import show
from meshd.cli.support.progress import progress
from meshd.display import duration, short_id

EXAMPLE = "meshd migrate 10d4a1b2 attic --from desk"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("session", metavar="SESSION", help="the session's id from `meshd status`, or its first characters")
    parser.add_argument("peer", metavar="PEER", help="the peer to move it to: its name, or the first characters of its id")
    parser.add_argument(
        "--from", dest="source", metavar="PEER", help="move only the stages that this peer computes; default: all stages"
    )
    add_client(parser)


def run(args: Namespace) -> int:
    body = {"session": args.session, "target": args.peer} | ({"source": args.source} if args.source else {})
    name = f"moving {short_id(args.session)}"
    with progress() as shown:
        shown.update(name, 0.0, None, f"to {args.peer}")
        moved = daemon_of(args).post("/mesh/v1/migrate", body, timeout_s=STREAM_SILENCE_S)
        shown.update(name, 1.0, 1.0, f"to {args.peer}")
    show(f"{moved['session']} runs on {moved['plan']}: a pause of {duration(moved['pause_ms'] / 1e3)}")
    return 0
