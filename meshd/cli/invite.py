"""`meshd invite`: let another device join by a short code that works once."""

import json
import sys
from argparse import Namespace
from typing import Any

from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import Parser, add_client
from meshd.cli.support.client import Daemon, daemon_of
from meshd.cli.support.output import print_json, show
from meshd.cli.support.progress import Progress, progress
from meshd.display import plural
from meshd.errors import MeshdError, Unavailable

EXAMPLE = "meshd invite                      (on a device of the cluster)\n  meshd up --join 7-amber-lion      (on the new device)"
_DEFAULT_MINUTES = 10.0


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--minutes", type=float, default=_DEFAULT_MINUTES, metavar="N", help="how long the code works, up to 60; default: 10"
    )
    parser.add_argument("--close", action="store_true", help="close the invite that is open on the daemon")
    parser.add_argument("--json", action="store_true", help="print a JSON document on a line for each change instead of text")
    add_client(parser)


def run(args: Namespace) -> int:
    daemon = daemon_of(args)
    if args.close:
        closed = daemon.delete("/mesh/v1/invites")["closed"]
        print_json({"closed": closed}) if args.json else show("the invite is closed" if closed else "no invite is open")
        return 0
    return _invite(daemon, args.minutes, as_json=args.json)


def _invite(daemon: Daemon, minutes: float, *, as_json: bool) -> int:
    """Open an invite, and show how it goes until it has ended. Leaving, also by Ctrl-C, closes it."""
    step: dict[str, Any] = {}
    with daemon.stream("/mesh/v1/invites", {"minutes": minutes}) as stream, progress() as shown:
        for event in stream.events():
            before, step = step, event
            if as_json:
                if _told(before) != _told(step):
                    print(json.dumps(step, ensure_ascii=True), flush=True)
            elif not before:
                _show_code(step, minutes)
            elif step["state"] == "waiting":
                _show_waiting(shown, step, minutes)
    return _ended(step, quiet=as_json)


def _told(step: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in step.items() if name not in ("left_s", "code")}


def _show_code(step: dict[str, Any], minutes: float) -> None:
    code = step["code"]
    show(code)
    notice(f"on the other device, within {minutes:g} min, type: meshd up --join {code}")
    for address in step["addresses"][:2]:
        notice(f"if it does not find this device:         meshd up --join {code}@{address}")
    notice("the code works once; three wrong tries, by anybody in this network, close the invite; Ctrl-C closes it too")


def _show_waiting(shown: Progress, step: dict[str, Any], minutes: float) -> None:
    whole, left = 60 * minutes, int(step["left_s"])
    if step["joined"]:
        text = f"{step['joined']} is joining"
    else:
        # Off a terminal each new text is a line of its own: one a minute is enough.
        text = f"{left // 60}:{left % 60:02} left" if sys.stderr.isatty() else f"{left // 60 + 1} min left"
        wrong = 3 - step["tries_left"]
        text += f", {plural(wrong, 'wrong try')}" if wrong == 1 else f", {wrong} wrong tries" if wrong else ""
    shown.update("waiting for a device", min(whole - left, whole * 0.999), whole, text)


def _ended(step: dict[str, Any], *, quiet: bool) -> int:
    """Say how the invite ended. Returns: the exit status. Raises: MeshdError if no device has joined."""
    match step.get("state"):
        case "joined":
            if not quiet:
                show(f"joined: {step['joined']}")
            return 0
        case "sent":
            raise MeshdError(
                f"{step['joined']} was sent the cluster's key, but broke off before it said that it stored it",
                hint="see `meshd status` whether it has joined; if not, invite it again",
            )
        case "tries":
            raise MeshdError(
                "three wrong tries: the invite is closed, and nobody has joined",
                hint="invite again; if the tries were not yours, somebody in this network guesses: then use `meshd key show`",
            )
        case "expired":
            raise MeshdError("the time is over, and nobody has joined", hint="invite again; --minutes N gives more time")
        case "closed":
            raise Unavailable("the invite was closed from elsewhere", hint="invite again")
        case _:
            raise MeshdError("the invite failed", hint="see the daemon's log")
