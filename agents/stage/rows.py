"""Rows of `/mesh/v1/sessions`: the stages that run on this peer, and the copies of other peers' stages."""

from collections.abc import Callable, Iterable
from typing import Any

from meshd.agents.stage.kv import SessionKv, StageCache
from meshd.agents.stage.steps import ActiveStage
from meshd.types import ModelId


def session_rows(
    stages: Iterable[ActiveStage], sessions: Iterable[SessionKv], name_of: Callable[[ModelId], str]
) -> list[dict[str, Any]]:
    """Return one row for each running stage, then one for each copy."""
    rows = [_stage_row(active, name_of) for active in stages]
    rows += [_mirror_row(session_kv, cache, name_of) for session_kv in sessions for cache in session_kv.caches if cache.source]
    return rows


def _stage_row(active: ActiveStage, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
    return {
        "id": active.open.session,
        "role": f"stage {active.open.stage}",
        "model": name_of(active.open.plan.model),
        "state": active.machine.state.value,
        "tokens": max(0, active.machine.due - active.open.prompt_tokens),
        "prompt_tokens": active.open.prompt_tokens,
        "epoch": active.open.epoch,
        "plan": str(active.stage.layers),
        "blocks": active.cache.lease.kv.pages,
    }


def _mirror_row(session_kv: SessionKv, cache: StageCache, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
    return {
        "id": session_kv.session,
        "role": f"mirror {cache.layers}",
        "model": name_of(cache.lease.kv.key.model),
        "state": "kept",
        "tokens": cache.filled,
        "prompt_tokens": 0,
        "epoch": cache.epoch,
        "plan": str(cache.layers),
        "blocks": cache.lease.kv.pages,
    }
