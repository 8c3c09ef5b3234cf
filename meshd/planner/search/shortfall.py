"""Errors for problems without a plan: how much memory is missing, on which peers, and what would help."""

import msgspec
import numpy as np

from meshd.errors import DoesNotFit, MeshdError, NotReady, Overloaded
from meshd.planner.chain import LayerRun
from meshd.planner.eligible import eligible
from meshd.planner.model.estimate import peer_memory
from meshd.planner.model.memory import RESERVE, capacity_bytes, missing_bytes
from meshd.planner.model.tables import CostTables
from meshd.planner.problem import PlanInput
from meshd.planner.search.exact import ChainCosts
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.select import search_for
from meshd.planner.units import show_bytes
from meshd.types import Holding, StagePlan

_LATER = "ask for a smaller context, or try again after other requests have ended"
SMALLEST_CONTEXT = 64
"""Smallest context that a hint offers."""


def does_not_fit(problem: PlanInput) -> MeshdError:
    """Make the error for a problem without a plan: DoesNotFit, or with `resident_only` NotReady or Overloaded."""
    if problem.resident_only:
        return _not_resident(problem)
    runs, tables, missing = _least_overflow(problem, problem.context)
    where = ", ".join(f"{tables.peers[run.peer].name} {show_bytes(size)}" for run, size in zip(runs, missing, strict=True) if size)
    card = problem.card
    return DoesNotFit(
        f"{card.name} with a context of {problem.context} does not fit: {show_bytes(sum(missing))} of memory are missing"
        f" on the {len(tables.peers)} peers that can take layers (best placement lacks: {where})",
        missing_bytes=sum(missing),
        hint=_hint(problem),
    )


def check_given(problem: PlanInput, stages: tuple[StagePlan, ...]) -> None:
    """Check that the requested stages fit. Raises: DoesNotFit; with `resident_only`, NotReady or Overloaded instead."""
    if problem.resident_only:
        _check_resident(problem, stages)
        return
    short = [(use.peer, missing_bytes(use.use.total_bytes, use.capacity_bytes)) for use in peer_memory(problem, stages)]
    short = [(peer, size) for peer, size in short if size]
    if short:
        names = {profile.id: profile.name for profile in problem.profiles}
        where = ", ".join(f"{names[peer]} lacks {show_bytes(size)}" for peer, size in short)
        raise DoesNotFit(
            f"these stages do not fit at a context of {problem.context}: {where}",
            missing_bytes=sum(size for _, size in short),
            hint="give that peer fewer layers, or ask for a smaller context",
        )


def _least_overflow(problem: PlanInput, context: int) -> tuple[tuple[LayerRun, ...], CostTables, list[int]]:
    """Find the placement of all layers that lacks the least free memory in total.

    Returns: (its runs, the tables, bytes that each run lacks).
    """
    asked = msgspec.structs.replace(problem, context=context, prompt_tokens=min(problem.prompt_tokens, context))
    tables = CostTables(asked, eligible(asked))
    capacity = np.array([capacity_bytes(asked, peer) for peer in tables.peers], dtype=np.float64)
    over = np.ceil(np.maximum(0.0, tables.memory / (1 - RESERVE) - capacity[:, None, None]))
    count = len(tables.peers)
    chain = search_for(count)(ChainCosts(over, np.zeros((count, count))), SearchLimits(least=asked.min_peers))
    runs = chain.runs if chain else ()
    missing = [missing_bytes(float(tables.memory[run.peer, run.start, run.end]), capacity[run.peer]) for run in runs]
    return runs, tables, missing


def _hint(problem: PlanInput) -> str:
    context = problem.context // 2
    while context >= SMALLEST_CONTEXT:
        if not any(_least_overflow(problem, context)[2]):
            return f"a context of {context} fits; or start `meshd up` on another device"
        context //= 2
    return "start `meshd up` on another device, or take a smaller model"


def _not_resident(problem: PlanInput) -> MeshdError:
    """Make the error for a problem that has no route over resident layers.

    Returns: NotReady if the resident layers form no route even without other sessions; Overloaded if other sessions use the KV.
    """
    card, count = problem.card, problem.card.spec.layers
    peers = eligible(problem)
    covered = {layer for peer in peers for holding in peer.usable_holdings for layer in holding.layers}
    absent = [layer for layer in range(count) if layer not in covered]
    if absent:
        return NotReady(
            f"{card.name} cannot answer yet: layers {_runs(absent)} are resident on no peer", progress=1 - len(absent) / count
        )
    if not _route_if_idle(problem, context=1):
        wanted = f" of {problem.min_peers} peers or more" if problem.min_peers > 1 else ""
        return NotReady(f"{card.name} cannot answer yet: its resident layers do not form a chain{wanted} with one run per peer")
    if not _route_if_idle(problem, context=problem.context):
        return NotReady(f"{card.name} cannot answer yet: it was placed with KV for fewer than {problem.context} tokens")
    free = ", ".join(f"{peer.name} {max(holding.kv_tokens_free for holding in peer.usable_holdings)}" for peer in peers)
    return Overloaded(
        f"no route over the resident layers of {card.name} has KV free for {problem.context} tokens (free: {free})",
        hint=_LATER,
    )


def _route_if_idle(problem: PlanInput, context: int) -> bool:
    """Whether a chain of resident layers would have KV for `context` tokens if there were no other sessions."""
    idle = tuple(msgspec.structs.replace(profile, holdings=tuple(map(_idle, profile.holdings))) for profile in problem.profiles)
    asked = msgspec.structs.replace(problem, profiles=idle, context=context, prompt_tokens=1)
    tables = CostTables(asked, eligible(asked))
    links = np.zeros((len(tables.peers), len(tables.peers)))
    return search_for(len(tables.peers))(ChainCosts(tables.possible, links), SearchLimits(least=problem.min_peers)) is not None


def _idle(holding: Holding) -> Holding:
    return msgspec.structs.replace(holding, kv_tokens_free=holding.kv_tokens_total)


def _check_resident(problem: PlanInput, stages: tuple[StagePlan, ...]) -> None:
    for stage in stages:
        profile = problem.profile(stage.peer)
        holders = [holding for holding in profile.usable_holdings if stage.layers in holding.layers]
        if not holders:
            raise NotReady(f"{profile.name} does not hold layers {stage.layers} of {problem.card.name} yet")
        if max(holding.kv_tokens_total for holding in holders) < problem.context:
            raise NotReady(f"{profile.name} holds layers {stage.layers} with KV for fewer than {problem.context} tokens")
        if max(holding.kv_tokens_free for holding in holders) < problem.context:
            raise Overloaded(f"{profile.name} has no KV free for {problem.context} tokens", hint=_LATER)


def _runs(layers: list[int]) -> str:
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer + 1 for layer in layers if layer + 1 not in layers]
    return ", ".join(f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
