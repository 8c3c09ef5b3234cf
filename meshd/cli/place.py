"""`meshd place MODEL`: load a model's layers on peers before the first request."""

from argparse import Namespace
from typing import Any

from meshd.cli.support.arguments import Parser, add_client, add_quant
from meshd.cli.support.client import Daemon, daemon_of
from meshd.cli.support.fetching import known_model
from meshd.cli.support.output import show
from meshd.cli.support.progress import progress
from meshd.display import layers
from meshd.errors import RemoteFailure

EXAMPLE = "meshd place smollm2:135m --stages attic:0-12,desk:12-30"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name or reference")
    add_quant(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--stages",
        metavar="a:0-12,b:12-30",
        help="the layers that each peer holds, half-open ranges from 0; default: the planner decides",
    )
    how.add_argument("--min-peers", type=int, metavar="N", help="split the model over at least N peers")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to reserve KV memory for")
    add_client(parser)


def run(args: Namespace) -> int:
    body = {key: getattr(args, key) for key in ("stages", "min_peers", "context") if getattr(args, key) is not None}
    daemon = daemon_of(args)
    body["model"] = known_model(args, daemon)
    for holding in place(daemon, body):
        show(holding)
    return 0


def place(daemon: Daemon, body: dict[str, Any]) -> list[str]:
    """Place a model and show the progress.

    Returns: lines `NAME holds layers A-B`. Raises: RemoteFailure if a peer could not load its layers; what `Daemon.stream` raises.
    """
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    with daemon.stream("/mesh/v1/place", body) as stream, progress() as shown:
        for step in stream.events():
            key = (step["name"], layers(step["layers"]))
            latest[key] = step
            text = " ".join(filter(None, (step["state"], step["message"])))
            shown.update(f"{key[0]} layers {key[1]}", step["progress"], 1.0, text)
    failed = [
        f"{name} layers {held} {step.get('message', '')}" for (name, held), step in latest.items() if step["state"] == "failed"
    ]
    if failed:
        hint = "see `meshd status` and that peer's log"
        raise RemoteFailure(f"{body['model']} could not be placed: {'; '.join(failed)}", hint=hint)
    return [f"{name} holds layers {held}" for name, held in sorted(latest, key=lambda key: int(key[1].split("-")[0]))]
