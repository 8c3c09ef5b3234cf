"""Reads the inner state of a peer's process, for the checks of invariants."""

from collections.abc import Iterator
from functools import partial

from meshd.agents.links.rpc import MAX_REQUESTS
from meshd.agents.links.task_budget import PER_PEER
from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.session.journal.store import MAX_RECORDS
from meshd.agents.stage.steps import ActiveStage
from meshd.kernels.kv import BlockTable
from sim.peer.process import MAX_SESSIONS, QUEUE_LIMIT, SimProcess


def used_tables(process: SimProcess, resident: ResidentLayers) -> list[BlockTable]:
    """Return the block tables of `resident` that a session's cache or a waiting or running step uses."""
    leases = {id(cache.lease): cache.lease for session_kv in process.stages._kv_manager for cache in session_kv.caches}
    for active in (*process.stages._active.values(), *_computing(process)):
        leases[id(active.cache.lease)] = active.cache.lease
    return [lease.table for lease in leases.values() if lease.resident is resident]


def _computing(process: SimProcess) -> Iterator[ActiveStage]:
    """Yield the stages with a step that waits for the compute thread or runs on it. A stage may have ended before its step."""
    for active, step in (*process.stages._ready._decodes, *process.stages._ready._prefills):
        if active.machine.computing is step:
            yield active
    for work in process.compute.works():
        if isinstance(work, partial) and work.args and isinstance(work.args[0], ActiveStage):
            yield work.args[0]


def queues(process: SimProcess) -> list[tuple[str, int, int]]:
    """Return (name, length, limit) of each queue."""
    coordinator, links, stages = process.coordinator, process.links.dispatcher, process.stages
    rows = [
        ("answers", len(coordinator.answers), MAX_SESSIONS + QUEUE_LIMIT),
        ("retained answers", len(coordinator.retained), 256),
        ("requests of one peer", max(links._budget._peers.values(), default=0), PER_PEER),
        ("own requests", len(links._waiting), MAX_REQUESTS),
        ("journal entries", len(process.agents.journal), MAX_SESSIONS + QUEUE_LIMIT + 2 * 256),
        ("steps that are ready", len(stages._ready._decodes) + len(stages._ready._prefills), 4 * MAX_SESSIONS),
        ("records of others", len(process.agents.deputy.store), MAX_RECORDS),
        ("bytes of kept outputs", stages._kv_manager.outputs.used_bytes, process.spec.outputs_bytes),
    ]
    rows += [("tasks of an answer", len(answer.tasks), 64) for answer in coordinator.answers.values()]
    rows += [("caches of a session", len(session_kv.caches), 32) for session_kv in stages._kv_manager]
    return rows


def leftovers(process: SimProcess) -> list[str]:
    """Return a line for each thing that should be gone once all sessions have ended."""
    coordinator, stages = process.coordinator, process.stages
    left = [f"answer {answer.session[:6]} {answer.machine.state.value}" for answer in coordinator.answers.values()]
    left += [f"stage {active.open.stage} of {active.open.session[:6]}" for active in stages._active.values()]
    left += [f"a lease of {session_kv.session[:6]} with {len(session_kv.caches)} caches" for session_kv in stages._kv_manager]
    if coordinator.admission.running or coordinator.admission.waiting:
        left.append(f"{coordinator.admission.running} tickets taken, {coordinator.admission.waiting} waiting")
    if stages._kv_manager.outputs.used_bytes or stages._kv_manager.outputs._logs:
        left.append(f"{stages._kv_manager.outputs.used_bytes} bytes of kept outputs")
    if any(resident.sessions for resident in process.holdings):
        left.append("resident layers that count sessions")
    if process.idle_tasks and (more := process.tasks() - process.idle_tasks):
        left.append(f"more tasks than before the first session: {dict(more)}")
    return left
