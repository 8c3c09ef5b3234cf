"""Reads the inner state of a peer's process, for the checks of invariants."""

from collections.abc import Iterator

from meshd.agents.links.rpc import MAX_REQUESTS
from meshd.agents.links.task_budget import PER_PEER
from meshd.agents.placement.resident import LoadState
from meshd.agents.session.journal.store import MAX_RECORDS
from meshd.agents.stage.batch.parked import MAX_PARKED
from meshd.agents.stage.steps import ActiveStage
from meshd.bounds import MAX_BATCH
from meshd.kernels.kv.lease import ArenaLease
from sim.peer.compute import batch_of
from sim.peer.process import QUEUE_LIMIT, SimProcess


def used_leases(process: SimProcess) -> list[ArenaLease]:
    """Return the leases that a session's cache, a waiting or running step, or the check of loaded layers uses."""
    leases = {id(cache.lease): cache.lease for session_kv in process.stages._kv_manager for cache in session_kv.caches}
    for active in (*process.stages._active.values(), *_computing(process)):
        leases[id(active.cache.lease)] = active.cache.lease
    checked = [resident.kv for resident in process.holdings if resident.state is LoadState.WARM and resident.kv is not None]
    return [lease.kv for lease in leases.values()] + [lease for share in checked for lease in share.leases]


def _computing(process: SimProcess) -> Iterator[ActiveStage]:
    """Yield the stages with a step that waits for the compute thread or at a cut, or runs; it may have ended before its step."""
    for work in process.compute.works():
        yield from (part.active for part in batch_of(work))
    for job in process.stages._runner.parked.jobs:
        yield from (part.active for part in job.batch)


def queues(process: SimProcess) -> list[tuple[str, int, int]]:
    """Return (name, length, limit) of each queue."""
    coordinator, links, stages = process.coordinator, process.links.dispatcher, process.stages
    running = 2 * process.spec.max_sessions  # half of them were taken over from lost coordinators
    rows = [
        ("answers", len(coordinator.answers), running + QUEUE_LIMIT),
        ("retained answers", len(coordinator.retained), 256),
        ("requests of one peer", max(links._budget._peers.values(), default=0), PER_PEER),
        ("own requests", len(links._waiting), MAX_REQUESTS),
        ("journal entries", len(process.agents.journal), running + QUEUE_LIMIT + 2 * 256),
        ("steps of a batch", len(stages._runner.job.batch) if stages._runner.job is not None else 0, MAX_BATCH),
        ("batches that wait at a cut", len(stages._runner.parked.jobs), MAX_PARKED),
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
    left += [f"{len(stages._preparing)} stages being prepared"] if len(stages._preparing) else []
    left += [f"stages of {resident.layers} in use" for resident in process.holdings if resident.stages.users]
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
