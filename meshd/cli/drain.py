"""`meshd drain PEER`: stop new work on a peer, and wait until its sessions have moved away."""

import time
from argparse import Namespace
from typing import Any

from meshd.cli.support.arguments import Parser, add_client
from meshd.cli.support.client import ANSWER_S, Daemon, daemon_of
from meshd.cli.support.output import show
from meshd.cli.support.progress import progress
from meshd.display import plural
from meshd.errors import Unavailable

EXAMPLE = "meshd drain attic\n  meshd drain attic --undo"
_STEP_S = 1.0
"""Longest time that one request waits, so that the number of remaining sessions is shown every second. The first request does
not wait."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("peer", metavar="PEER", help="a peer's name, or the first characters of its id")
    parser.add_argument("--undo", action="store_true", help="let the peer accept work again")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait until its sessions have moved; it keeps draining after that; default: 60",
    )
    add_client(parser)


def run(args: Namespace) -> int:
    daemon = daemon_of(args)
    if args.undo:
        show(f"{_ask(daemon, args.peer, undo=True)['name']} takes work again")
        return 0
    name = _drain(daemon, args.peer, args.timeout)
    show(f"{name} is drained: nothing runs on it and it takes no new work; stop it, or `meshd drain {name} --undo`")
    return 0


def _drain(daemon: Daemon, peer: str, timeout_s: float) -> str:
    """Drain a peer and wait until no session is left on it.

    Returns: its name. Raises: Unavailable after `timeout_s`; what `Daemon.post` raises.
    """
    until = time.monotonic() + timeout_s
    most, wait_s, left_s = 1, 0.0, timeout_s
    with progress() as shown:
        while True:
            row = _ask(daemon, peer, undo=False, timeout_s=wait_s)
            name: str = row["name"]
            left = row["sessions_left"]
            most = max(most, left)
            shown.update(f"draining {name}", most - left, most, f"{plural(left, 'session')} left")
            if not left:
                return name
            if left_s <= 0:
                hint = "it keeps draining: wait with a longer --timeout, or cancel with --undo"
                raise Unavailable(f"{name} is not drained after {timeout_s:g} s: {plural(left, 'session')} left there", hint=hint)
            left_s = max(0.0, until - time.monotonic())
            wait_s = min(_STEP_S, left_s)


def _ask(daemon: Daemon, peer: str, *, undo: bool, timeout_s: float = 0.0) -> dict[str, Any]:
    body = {"peer": peer, "undo": undo, "timeout_s": timeout_s}
    row: dict[str, Any] = daemon.post("/mesh/v1/drain", body, timeout_s=timeout_s + ANSWER_S)
    return row
