"""Rows of `/mesh/v1/sessions`: the stages that run on this peer, and the copies that it keeps."""

from collections.abc import Callable, Iterable
from typing import Any

from meshd.agents.stage.kv import SessionKv, StageKv
from meshd.agents.stage.steps import ActiveStage
from meshd.types import ModelId


def session_rows(
    stages: Iterable[ActiveStage], sessions: Iterable[SessionKv], name_of: Callable[[ModelId], str]
) -> list[dict[str, Any]]:
    """Running stages first, then the copies of other peers' stages."""
    running = [_stage_row(active, name_of) for active in stages]
    return running + [_mirror_row(each, cache, name_of) for each in sessions for cache in each.caches if cache.source]


def _stage_row(active: ActiveStage, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
    return {
        "id": active.open.session,
        "role": f"stage {active.open.stage}",
        "model": name_of(active.open.plan.model),
        "state": active.machine.state.value,
        "tokens": max(0, active.machine.next_position - active.open.prompt_tokens),
        "prompt_tokens": active.open.prompt_tokens,
        "epoch": active.open.epoch,
        "plan": str(active.stage.layers),
        "blocks": len(active.table.blocks),
    }


def _mirror_row(session_kv: SessionKv, cache: StageKv, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
    return {
        "id": session_kv.session,
        "role": f"mirror {cache.layers}",
        "model": name_of(cache.lease.resident.card.id),
        "state": "kept",
        "tokens": cache.filled,
        "prompt_tokens": 0,
        "epoch": cache.epoch,
        "plan": str(cache.layers),
        "blocks": len(cache.lease.table.blocks),
    }
