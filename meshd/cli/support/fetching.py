"""Fetch models to this device, and put the model that a command names where the daemon finds it.

A daemon opens no `file:` path that it is only asked for over the API. The command line runs as the owner of the daemon's folders,
so it records the file in the daemon's store and then asks for the model by name.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import model_of, settings_of
from meshd.cli.support.client import Daemon
from meshd.cli.support.interrupt import run_interruptibly
from meshd.cli.support.progress import progress
from meshd.config import Config
from meshd.errors import InvalidRequest, UnknownModel, UsageError
from meshd.models.store.catalogue import resolve
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store, StoredModel
from meshd.state import read_holder

_T = TypeVar("_T")


def store_of(config: Config, folder: Path | None = None) -> Store:
    """Open the store with this device's models; with `folder`, the store in that folder."""
    return Store(folder or config.models_dir, config.hf_cache, index_url=config.pypi_index)


def fetch(store: Store, ref: str) -> StoredModel:
    """Fetch a model, unless the store has it already, and show the progress.

    Raises: what `Store.pull` raises; KeyboardInterrupt within a second of Ctrl-C or SIGTERM. The bytes received so far are kept.
    """
    failures: list[str] = []
    with progress(of_bytes=True) as shown:

        def show(step: PullProgress) -> None:
            if step.phase is PullPhase.FAILED:
                failures.append(f"{step.source} was not used: {step.message}")  # if all fail, the error says why
            elif step.phase is PullPhase.NOTED:
                shown.say(f"note: {step.message}")
            elif step.phase is PullPhase.DONE:
                for failure in failures:
                    shown.say(failure)
            else:
                shown.update(f"{step.model}, {step.phase}", step.done_bytes, step.total_bytes, step.source)

        return run_interruptibly(store.pull(ref, show))


def known_model(args: Namespace, daemon: Daemon) -> str:
    """Return the name by which the daemon knows the command's model. A `file:` model is put into the daemon's store first.

    Raises: InvalidRequest if the daemon is not this device's; what `fetch` raises.
    """
    name = model_of(args)
    if name.startswith("file:"):
        store = _store_of_daemon(args, daemon)
        if store is None:
            raise InvalidRequest(
                f"{name} can't be used: the daemon at {daemon.url} does not run with this device's state folder",
                param="model",
                hint="run this on the daemon's device, with the daemon's --state folder",
            )
        fetch(store, name)
    return name


def with_model(args: Namespace, daemon: Daemon, ask: Callable[[], _T]) -> _T:
    """Ask the daemon. If its cluster does not have the model, fetch the model to the daemon's store and ask again.

    Raises: what `ask` and `fetch` raise; UnknownModel if the model is none that can be fetched to the daemon's store.
    """
    try:
        return ask()
    except UnknownModel as unknown:
        name = model_of(args)
        if name.startswith("file:") or not _has_source(name):
            raise
        store = _store_of_daemon(args, daemon)
        if store is None:
            hint = f"`meshd place {name} --api {daemon.url}` has that daemon fetch it"
            raise UnknownModel(f"the cluster of the daemon at {daemon.url} has no model {name!r}", hint=hint) from unknown
        notice(f"{name} is not in this cluster: it is fetched to this device (Ctrl-C stops; what has come is kept)")
        fetch(store, name)
        return ask()


def _has_source(name: str) -> bool:
    try:
        return bool(resolve(name).sources)
    except UsageError:
        return False


def _store_of_daemon(args: Namespace, daemon: Daemon) -> Store | None:
    """Return the store of the daemon that runs with this command's state folder; None if `daemon` is another one."""
    settings = settings_of(args)
    holder = read_holder(settings["state"].value)
    if holder is None or not holder.models or not daemon.is_at(holder.api):
        return None
    return store_of(settings.config(), Path(holder.models))
