"""The compute thread in virtual time: one job after another. The toy model and the peer's slowness determine durations."""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.stage.batch.compute import BatchStep
from meshd.agents.stage.batch.measure import BatchJob
from meshd.agents.stage.steps import StepInput
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.wire import decode
from meshd.protocol.messages import StepKind
from sim.loop import SimLoop
from sim.toy.backend import Meter, Speed
from sim.toy.mathematics import HIDDEN

T = TypeVar("T")
_LATEST_START_S = 0.0002
_MAX_JOBS = 512
_PARTS, _SHARED = "parts of prompts", "batches of several"
STEP_COUNTS = (*(f"{kind.value} steps" for kind in StepKind), _PARTS, _SHARED)
"""What `SimCompute.kinds` counts."""


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], Any]
    done: Callable[[Any], None]
    failed: Callable[[Exception], None]
    background: bool


def batch_of(work: Callable[[], Any]) -> Sequence[BatchStep]:
    """Return the steps that a job of the compute thread computes; none for other work."""
    if isinstance(work, partial) and work.args and isinstance(work.args[0], BatchJob):
        return work.args[0].batch
    return ()


def _damage(part: BatchStep) -> None:
    """Overwrite the KV that a refill step is to compute again, so that one that computes nothing is found.

    Not if its input is not finite, for then the step fails, and the KV stays as it is for the next epoch.
    """
    active, step, _ = part
    if step.kind is not StepKind.REFILL:
        return
    assert isinstance(step.data, StepInput)
    assert step.data.payload is not None
    if not np.isfinite(decode(step.data.payload, active.open.plan.wire_dtype, step.tokens, HIDDEN)).all():
        return
    lease = active.cache.lease.kv
    assert isinstance(lease, HostLease)
    for layer in active.cache.layers:
        for rows in lease.rows(layer):
            rows[step.start : step.end] = 1


class SimCompute(ComputeQueue):
    """The simulated compute thread.

    A job's function runs at once when the job starts, and then the job's virtual duration passes. So the function sees what the
    event loop did before the start (such as freeing memory), but nothing that the loop does during the job.
    """

    def __init__(self, loop: SimLoop, rng: random.Random, meter: Meter, speed: Speed) -> None:
        self.jobs = 0
        """Number of jobs run so far."""
        self.kinds: Counter[str] = Counter()
        """Number of steps of each kind, of parts of prompts, and of batches of several steps."""
        self.stalled = False
        """Whether the thread hangs in its job, while the event loop runs."""
        self._loop = loop
        self._rng = rng
        self._meter = meter
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._speed = speed
        self._stalled_call: Callable[[], None] | None = None
        """Continues the stalled job when the stall ends."""
        self._context = copy_context()
        """The context of the peer's process, for callbacks: faults call this class from another context."""
        self._pending: tuple[asyncio.TimerHandle, float, Callable[[], None]] | None = None
        """Timer of the running job's end, the slowness for which the timer was set, and the timer's callback."""

    def submit(
        self, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None], *, background: bool = False
    ) -> None:
        assert len(self._waiting) < _MAX_JOBS, "the compute thread's queue grows without bound"
        batch = batch_of(work)
        if batch:
            self._check(batch)
        self._waiting.append(_Job(work, done, failed, background))
        self._next()

    def works(self) -> list[Callable[[], Any]]:
        """Return the functions of the running job and of all waiting jobs."""
        running = [self._running] if self._running is not None else []
        return [job.work for job in (*running, *self._waiting)]

    def close(self, timeout_s: float = 2.0) -> None:
        self._waiting.clear()

    def stall(self) -> None:
        self.stalled = True

    def end_stall(self) -> None:
        """Let the stalled job continue now."""
        self.stalled = False
        call, self._stalled_call = self._stalled_call, None
        if call is not None:
            self._loop.call_soon(call, context=self._context)

    def _check(self, batch: Sequence[BatchStep]) -> None:
        """Check a batch that is given to the thread, and count its steps."""
        if any(batch_of(other) for other in self.works()):
            self._loop.faults.append("the compute thread is given a batch while it has another one")
        if len({part.active.key for part in batch}) < len(batch):
            self._loop.faults.append("two steps of a session are in one batch")
        self.kinds.update(f"{part.step.kind.value} steps" for part in batch)
        self.kinds[_PARTS] += sum(part.step.prefill and not part.step.sample for part in batch)
        self.kinds[_SHARED] += len(batch) > 1

    def _next(self) -> None:
        if self._running is None and self._waiting:
            job = self._running = min(self._waiting, key=lambda job: job.background)  # the first of several
            self._waiting.remove(job)
            self._loop.call_later(self._rng.random() * _LATEST_START_S, self._run, self._running)

    def _run(self, job: _Job) -> None:
        before = self._meter.spent_s
        for part in batch_of(job.work):
            _damage(part)
        callback: Callable[[Any], None]
        result: Any
        try:
            result = job.work()
            callback = job.done
        except Exception as error:
            result, callback = error, job.failed
        self.jobs += 1
        took_s = self._meter.spent_s - before
        self._wait(took_s, self._speed.slow, lambda: self._finished(callback, result))

    def _wait(self, seconds: float, slow: float, then: Callable[[], None]) -> None:
        self._pending = self._loop.call_later(seconds, then, context=self._context), slow, then

    def speed_changed(self) -> None:
        """Compute the end of the running job again, for the new speed."""
        if self._pending is not None and not self._pending[0].cancelled() and self._pending[0].when() > self._loop.time():
            timer, slow, then = self._pending
            timer.cancel()
            self._wait((timer.when() - self._loop.time()) * self._speed.slow / slow, self._speed.slow, then)

    def _finished(self, callback: Callable[[Any], None], result: Any) -> None:
        if self.stalled:
            self._stalled_call = lambda: self._finished(callback, result)
            return
        self._running = None
        self._next()
        callback(result)
