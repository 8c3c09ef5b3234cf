"""The one thread on which this peer computes: steps of all its stages, one after another."""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    done: Callable[[T], None]
    failed: Callable[[Exception], None]


class ComputeQueue(ABC):
    """Runs jobs one after another, and hands their results back to the event loop."""

    @abstractmethod
    def submit(self, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None]) -> None:
        """Run `work` after the jobs before it, then `done(result)` or `failed(error)` on the loop."""

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` after the jobs before it. Cancel: the work itself runs to its end, its result is dropped."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def done(result: T) -> None:
            if not future.done():
                future.set_result(result)

        def failed(error: Exception) -> None:
            if not future.done():
                future.set_exception(error)

        self.submit(work, done, failed)
        return await future

    @abstractmethod
    def close(self, timeout_s: float = 2.0) -> None:
        """Stop. Returns after `timeout_s` at the latest."""


class ComputeThread(ComputeQueue):
    """Runs jobs in order and hands their results back to the event loop.

    Its own thread, not an executor: waking it costs a third of `run_in_executor`'s time, and a decode step pays that price on every
    hop. Its users submit a new job when the last one has come back.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="meshd-compute", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None]) -> None:
        """Run `work` on the thread, then `done(result)` or `failed(error)` on the loop."""
        self._jobs.put(_Job(work, done, failed))

    def close(self, timeout_s: float = 2.0) -> None:
        """Run the jobs submitted so far, then stop. Returns after `timeout_s` at the latest."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                result = job.work()
            except Exception as error:
                self._give(job.failed, error)
            else:
                self._give(job.done, result)

    def _give(self, callback: Callable[..., None], value: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, value)
        except RuntimeError:
            return  # the loop is closed: nothing waits for this result any more
