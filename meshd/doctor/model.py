"""Checks what a model needs: whether it fits on this device, in the cluster, and on the disk."""

import shutil
from pathlib import Path
from typing import Any

from meshd.agents.cluster_service import CheckResult, PlanRequest
from meshd.agents.device.memory import measure_memory
from meshd.agents.placement.plan_input import USUAL_CONTEXT
from meshd.display import size
from meshd.doctor.check import Context, Found, LivePeer, ok, unchecked, warning, wrong
from meshd.errors import DoesNotFit, MeshdError, StorageError, UnknownModel
from meshd.models.cards import card_from_gguf
from meshd.models.files.disk import stamp_of
from meshd.models.store.index import Index
from meshd.models.store.store import Store
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.planner.search.solve import solve
from meshd.types import ModelCard, PeerId, Rates

LOOK_S = 60.0
"""Deadline: the header of a model that is not here is read from its source."""
_UNIT = Rates(
    decode_bytes_s=1e9, prefill_flops_s=1e9, memory_bytes_s=1e9, attention_bytes_s=1e9, disk_bytes_s=1e9, layer_overhead_s=1e-5
)
"""Rates for a search that only asks whether a model fits."""


async def model(context: Context) -> Found:
    """Check the named model, if there is one."""
    if context.model is None:
        return []
    try:
        if context.peer is not None:
            return await _in_cluster(context, context.model, context.peer)
        return await _alone(context, context.model)
    except DoesNotFit as error:
        return [wrong("model", error.message, error.hint or _OTHER_DEVICE, context.model)]
    except UnknownModel as error:
        mend = "`meshd models` lists the models that are known; `meshd pull REF` fetches another"
        return [wrong("model", error.message, f"{error.hint}; {mend}" if error.hint else mend, context.model)]
    except MeshdError as error:
        return [unchecked("model", error.message, error.hint or f"meshd pull {context.model}", context.model)]


_OTHER_DEVICE = "start `meshd up` on another device, or take a smaller model"


async def _in_cluster(context: Context, name: str, peer: LivePeer) -> Found:
    plan = await peer.plan(PlanRequest(model=name))
    results = [ok("model", f"fits: {plan['plan']}, with a context of {plan['context']}", name)]
    alone = next((row for row in plan["alone"] if row["peer"] == peer.id), None)
    if alone is not None:
        missing = alone["missing_bytes"]
        text = f"this device alone lacks {size(missing)} for it" if missing else "it fits on this device alone"
        results.append(ok("model", text, name))
    if plan["fetch"]:
        results += _room(context, name, plan["fetch"])
    return results


def _room(context: Context, name: str, fetch: dict[str, Any]) -> Found:
    """Check that the disk has room for the file."""
    folder = context.config.hf_cache
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    if free < fetch["bytes"]:
        found = f"{size(fetch['bytes'])} must be fetched, but {there} has only {size(free)} free"
        mend = f"remove models with `meshd rm MODEL`, or use another folder: `--hf-cache DIR` (now {folder})"
        return [wrong("model-disk", found, mend, name)]
    return [ok("model-disk", f"{size(fetch['bytes'])} are to be fetched, {size(free)} are free", name)]


def stored(context: Context) -> Found:
    """Check that the files of the models on this device are there and whole.

    A file that was imported in place belongs to the user, who may remove it: the model is then not known any more.
    """
    folder = context.config.models_dir
    try:
        models = Index(folder).read()
    except StorageError as error:
        return [wrong("models", error.message, f"rm {folder / 'index.json'}, then `meshd pull MODEL` for each")]
    bad, gone = [], []
    for each in models:
        if not each.is_here() and each.in_place:
            gone.append(
                ok("models", f"its file {each.path} was removed by its owner, so the model is not known any more", each.name)
            )
        elif not each.is_here():
            bad.append(wrong("models", f"its file {each.path} is gone or torn", f"meshd pull {each.name}", each.name))
        elif stamp_of(each.path) != each.stamp:
            found = f"{each.path} was changed after it was checked, so it is hashed again before use"
            bad.append(warning("models", found, f"meshd pull {each.name}", each.name))
    here = [each for each in models if each.is_here()]
    total = size(sum(each.size_bytes for each in here))
    return [*bad, *gone, ok("models", f"{len(here)} on this device, {total}" if here else "none on this device yet")]


async def _alone(context: Context, name: str) -> Found:
    """Check the model on this device only, because no daemon knows of others."""
    config = context.config
    store = Store(config.models_dir, config.hf_cache, index_url=config.pypi_index, clock=context.clock)
    results: list[CheckResult] = []
    stored = store.get(name)
    if stored is not None:
        with store.open(stored) as file:
            card = card_from_gguf(file, name=stored.name, ref=stored.ref, model_id=stored.id, created=stored.created)
    else:
        preview = await store.look(name)
        card = preview.card
        results += _room(context, name, {"bytes": preview.fetch_bytes})
    needed = fits_alone(card, measure_memory(config.memory_bytes, root=context.root).free_bytes)
    return [ok("model", f"fits on this device alone: {size(needed)} at a context of {_context(card)}", name), *results]


def fits_alone(card: ModelCard, free_bytes: int) -> int:
    """Compute the memory that a model takes on one device. Raises: DoesNotFit, which says how much is missing."""
    here = PeerProfile(id=PeerId("this"), name="this device", rates=_UNIT, memory_free_bytes=free_bytes)
    problem = PlanInput(
        card=card,
        profiles=(here,),
        network=Network.from_adverts([]),
        context=_context(card),
        prompt_tokens=min(128, _context(card)),
    )
    [used] = solve(problem).estimate.memory
    return used.use.total_bytes


def _context(card: ModelCard) -> int:
    return min(card.spec.context_length, USUAL_CONTEXT)
