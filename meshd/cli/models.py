"""`meshd models`: list the known models, the peers that store them and the peers that hold their layers."""

from argparse import Namespace
from typing import Any

from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import Parser, add_client, add_json, add_settings, settings_of
from meshd.cli.support.client import daemon_of
from meshd.cli.support.fetching import store_of
from meshd.cli.support.output import print_json, show, table
from meshd.display import ABSENT, size
from meshd.errors import MeshdError, Unavailable
from meshd.models.cards import card_from_gguf
from meshd.models.store.catalogue import CATALOGUE
from meshd.models.store.store import Store, StoredModel
from meshd.types import ModelCard

EXAMPLE = "meshd models --json"


def add_arguments(parser: Parser) -> None:
    add_json(parser)
    add_client(parser)
    add_settings(parser, ("cache", "models-dir"))


def run(args: Namespace) -> int:
    settings = settings_of(args)
    store = store_of(settings.config())
    try:
        mesh = daemon_of(args).rows("/mesh/v1/models")
    except Unavailable as error:
        if settings.named("api"):
            raise
        notice(f"only this device's models are listed: {error.message}")
        mesh = []
    rows = merged([(model, _card(store, model)) for model in store.list()], mesh)
    if args.json:
        print_json({"object": "list", "data": rows})
    else:
        show(table(("MODEL", "SIZE", "QUANT", "HERE", "ON DISK OF", "LAYERS HELD", "ANSWERS"), map(_cells, rows)))
    return 0


def _card(store: Store, model: StoredModel) -> ModelCard | None:
    """Read a model's card; None if its file can't be used."""
    try:
        with store.open(model) as file:
            return card_from_gguf(file, name=model.name, ref=model.ref, model_id=model.id, created=model.created)
    except MeshdError as error:
        notice(f"{model.name} can't be used: {error}")
        return None


def merged(stored: list[tuple[StoredModel, ModelCard | None]], mesh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the models of the mesh, of this device and of the catalogue: one row per model.

    A row's `path` is the model's file on this device; None if this device does not have the model.
    """
    rows = {row["name"]: {**row, "path": None} for row in mesh}
    for model, card in stored:
        known = rows.setdefault(model.name, _row(model.name, model.ref, model.id, model.size_bytes) | _known_of(card))
        known["path"] = str(model.path)
    for entry in CATALOGUE.values():
        rows.setdefault(entry.name, _row(entry.name, str(entry.sources[0]), None, entry.size_bytes))
    return list(rows.values())


def _known_of(card: ModelCard | None) -> dict[str, Any]:
    """Return the values that the mesh's row of this model would have."""
    if card is None:
        return {}
    about = {"quantisation": card.quantisation, "layers": card.spec.layers, "context_length": card.spec.context_length}
    return {**about, "bytes": card.weight_bytes}


def _row(name: str, ref: str, identifier: str | None, size_bytes: int | None) -> dict[str, Any]:
    """Make the row of a model that the mesh did not list, with the keys of a row of the mesh."""
    return {
        "id": identifier,
        "name": name,
        "ref": ref,
        "quantisation": None,
        "layers": None,
        "context_length": None,
        "bytes": size_bytes,
        "answers": False,
        "loaded": False,
        "on_disk": [],
        "holdings": [],
        "path": None,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        size(row["bytes"]),
        row["quantisation"] or ABSENT,
        "yes" if row["path"] else "no",
        ", ".join(row["on_disk"]) or ABSENT,
        ", ".join(f"{held['name']}:{held['layers']}" for held in row["holdings"]) or ABSENT,
        "yes" if row["loaded"] else "when asked" if row["answers"] else "no",
    )
