"""`meshd plan MODEL`: predict which peers would hold which layers, and how fast answers would be."""

from argparse import Namespace
from typing import Any

from meshd.cli.support.arguments import Parser, add_client, add_json, add_quant
from meshd.cli.support.client import STREAM_SILENCE_S, daemon_of
from meshd.cli.support.fetching import known_model
from meshd.cli.support.output import print_json, show

EXAMPLE = 'meshd plan smollm2:135m --context 4096 --what-if "+attic ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms"'


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model's name or reference; of a model that the cluster does not have, only the header is fetched",
    )
    add_quant(parser)
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens to reserve KV memory for; default: the model's context length"
    )
    parser.add_argument(
        "--objective", choices=("latency", "ttft", "throughput", "energy", "memory"), help="what to optimise; default: latency"
    )
    parser.add_argument(
        "--what-if",
        action="append",
        metavar='"+NAME ram=... bw=..."',
        help="add a hypothetical peer with this memory, memory bandwidth, link and round trip; repeatable",
    )
    parser.add_argument("--stages", metavar="a:0-12,b:12-30", help="predict this split instead of searching for the best one")
    parser.add_argument("--peers", type=lambda text: text.split(","), metavar="a,b", help="use only these peers")
    parser.add_argument("--min-peers", type=int, metavar="N", help="split the model over at least N peers")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also show the time per stage and hop, the binding constraint and the second-best plan",
    )
    add_json(parser)
    add_client(parser)


def run(args: Namespace) -> int:
    daemon = daemon_of(args)
    plan = daemon.post("/mesh/v1/plan", request_of(args, known_model(args, daemon)), timeout_s=STREAM_SILENCE_S)
    if args.json:
        print_json(plan)
        return 0
    show("\n".join([*plan["text"], *(plan.get("explanation", ()) if args.explain else ())]))
    return 0


def request_of(args: Namespace, model: str) -> dict[str, Any]:
    """Make the body of `POST /mesh/v1/plan`."""
    mesh = {key: getattr(args, key) for key in ("stages", "peers", "min_peers") if getattr(args, key) is not None}
    body = {key: getattr(args, key) for key in ("context", "objective", "what_if") if getattr(args, key) is not None}
    return body | {"model": model} | ({"mesh": mesh} if mesh else {})
