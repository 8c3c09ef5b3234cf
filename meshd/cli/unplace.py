"""`meshd unplace MODEL`: free a model's layers on every peer."""

from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_client, model_of
from meshd.cli.support.client import STREAM_SILENCE_S, daemon_of
from meshd.cli.support.output import show
from meshd.display import size

EXAMPLE = "meshd unplace smollm2:135m"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name or reference")
    add_client(parser)


def run(args: Namespace) -> int:
    model = model_of(args)
    answer = daemon_of(args).post("/mesh/v1/unplace", {"model": model}, timeout_s=STREAM_SILENCE_S)
    show(f"{model}: {size(answer['freed_bytes'])} freed")
    return 0
