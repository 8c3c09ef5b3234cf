"""`meshd rm REF`: remove a model from this device."""

from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_settings, model_of, settings_of
from meshd.cli.support.fetching import store_of
from meshd.cli.support.output import show
from meshd.display import size

EXAMPLE = "meshd rm smollm2:135m"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="REF", help="the model's name or reference (`meshd models`)")
    add_settings(parser, ("state", "config", "cache", "models-dir", "hf-cache"))


def run(args: Namespace) -> int:
    model = model_of(args)
    freed = store_of(settings_of(args).config()).remove(model)
    show(f"{model} is removed: {size(freed)} freed")
    return 0
