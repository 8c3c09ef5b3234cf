"""The queue of this peer's compute jobs and the single thread that runs them."""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    done: Callable[[T], None]
    failed: Callable[[Exception], None]
    background: bool


class ComputeQueue(ABC):
    """Runs jobs one after another and returns their results to the event loop.

    A background job starts only when no other job waits. So a session's step waits for one background job at most: the running one.
    """

    @abstractmethod
    def submit(
        self, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None], *, background: bool = False
    ) -> None:
        """Queue `work`. After it has run, `done(result)` or `failed(error)` is called on the event loop."""

    async def call(self, work: Callable[[], T], *, background: bool = False) -> T:
        """Queue `work` and wait for its result. Raises: what `work` raises. Cancel: `work` still runs; its result is dropped."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def done(result: T) -> None:
            if not future.done():
                future.set_result(result)

        def failed(error: Exception) -> None:
            if not future.done():
                future.set_exception(error)

        self.submit(work, done, failed, background=background)
        return await future

    @abstractmethod
    def close(self, timeout_s: float = 2.0) -> None:
        """Stop running jobs. Jobs that have not started never run. Returns after `timeout_s` at the latest."""


class ComputeThread(ComputeQueue):
    """A `ComputeQueue` on a thread of its own.

    It does not use an executor: `run_in_executor` takes three times as long to wake its thread, and every hop of a decode step
    waits for that. The queue has no size limit, because each caller submits a job only after the result of its last one.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._background: deque[_Job[Any]] = deque()
        """Background jobs that the thread has taken from the queue. Only the thread uses it."""
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="meshd-compute", daemon=True)
        self._thread.start()

    def submit(
        self, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None], *, background: bool = False
    ) -> None:
        self._jobs.put(_Job(work, done, failed, background))

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait for the running job, for at most `timeout_s`. Jobs that have not started never run."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._next()) is not None and not self._closing:
            try:
                result = job.work()
            except Exception as error:
                self._post(job.failed, error)
            else:
                self._post(job.done, result)

    def _next(self) -> _Job[Any] | None:
        """Wait for the next job: the oldest one, but a background job only if there is no other. Returns: None at the end."""
        while True:
            try:
                job = self._jobs.get(block=not self._background)
            except queue.Empty:
                return self._background.popleft()
            if job is None or not job.background:
                return job
            self._background.append(job)

    def _post(self, callback: Callable[..., None], value: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, value)
        except RuntimeError:
            return  # the loop is closed, so nothing waits for the result
