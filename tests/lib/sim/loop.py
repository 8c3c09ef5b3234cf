"""An event loop in virtual time: nothing waits, the clock jumps to the next timer. The same start gives the same run.

Every callback belongs to an owner (a peer), by its context. A stopped owner's callbacks are put aside: that is a frozen process. A
killed one's are run to their end where nobody sees it.
"""

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")

_SAME_TIME_LIMIT = 200_000
"""Callbacks without the clock moving: more are a loop that never ends."""
_THREAD_S = 0.0005
"""What a job on another thread takes at most."""


@dataclass(eq=False, slots=True)
class Owner:
    """Whose callbacks these are."""

    name: str
    stopped: bool = False
    dead: bool = False
    """What it still does is the end of a killed process: it counts for nothing."""
    deferred: deque[asyncio.Handle] = field(default_factory=deque)
    tasks: dict[int, "SimTask"] = field(default_factory=dict)
    after: Callable[[], None] | None = None
    """Called after each of its callbacks."""

    def context(self) -> Context:
        """A fresh context whose callbacks and tasks are this owner's."""
        context = Context()
        context.run(OWNER.set, self)
        return context


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)


class Stuck(AssertionError):
    """Nothing can ever happen again, or everything happens at once for ever."""


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its number: sets of tasks are walked in the same order in every run."""

    number: int
    owner: Owner | None = None

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.BaseEventLoop):
    """Run it with `run_until_complete`."""

    def __init__(self, rng: random.Random, start: float = 1000.0) -> None:
        super().__init__()
        self.callbacks = 0
        """Run so far."""
        self.timers_run = 0
        """Of these, those that a timer started: a message arrived, a step came back, a wait was over."""
        self.faults: list[str] = []
        """What no code caught."""
        self._rng = rng
        self._virtual_now = start
        self._order = itertools.count()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count(1)
        self._since_moved = 0
        self._ready: deque[asyncio.Handle]
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._note_fault)

    def time(self) -> float:
        return self._virtual_now

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._virtual_now + delay, callback, *args, context=context)

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Here, a moment later."""
        future: asyncio.Future[T] = self.create_future()

        def run() -> None:
            if future.done():
                return
            try:
                result = func(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self._rng.random() * _THREAD_S, run)
        return future

    def resume(self, owner: Owner) -> None:
        """What was put aside while the owner was stopped runs now, in order."""
        owner.stopped = False
        self._ready.extend(owner.deferred)
        owner.deferred.clear()

    def _run_once(self) -> None:
        ready = self._ready
        timers = self._timers
        if not ready:
            self._advance()
        while timers and timers[0][0] <= self._virtual_now:
            ready.append(heappop(timers)[2])
            self.timers_run += 1
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
            if owner is None:
                handle._run()
            elif owner.stopped:
                owner.deferred.append(handle)
                continue
            else:
                handle._run()
                if owner.after is not None:
                    owner.after()
            self.callbacks += 1
            self._since_moved += 1
        if self._since_moved > _SAME_TIME_LIMIT:
            self._since_moved = 0
            raise Stuck(f"{_SAME_TIME_LIMIT} callbacks at {self._virtual_now:.6f}: the clock does not move")

    def _advance(self) -> None:
        while self._timers and self._timers[0][2]._cancelled:
            heappop(self._timers)
        if not self._timers:
            raise Stuck(f"nothing is left to happen at {self._virtual_now:.6f}")
        if self._timers[0][0] > self._virtual_now:
            self._virtual_now = self._timers[0][0]
            self._since_moved = 0

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T] | Generator[Any, None, T], **named: Any
    ) -> SimTask:
        number = next(self._numbers)
        SimTask.number = number  # the C constructor hashes it already
        task = SimTask(coro, loop=self, **named)
        task.number = number
        context = named.get("context")
        owner = OWNER.get() if context is None else context.get(OWNER)
        if owner is not None:
            task.owner = owner
            owner.tasks[number] = task
            task.add_done_callback(lambda done: owner.tasks.pop(number, None))
        return task

    def _note_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        handle, owner = context.get("handle"), OWNER.get()
        owner = handle._context.get(OWNER) if handle is not None else owner
        owner = getattr(context.get("task") or context.get("future"), "owner", owner)
        if owner is not None and owner.dead:
            return
        self.faults.append(
            f"{context.get('message')}: {context.get('exception')!r} in {context.get('task') or context.get('handle')}"
        )

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class SimClock:
    """One peer's clock and entropy: its zero is its own, as between real machines."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self._loop = loop
        self._rng = rng
        self._zero = rng.uniform(0, 1e5)
        self._skew = rng.uniform(-30, 30)

    def monotonic(self) -> float:
        return self._loop.time() + self._zero

    def wall(self) -> float:
        return 1.75e9 + self._loop.time() + self._skew

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        return self._rng.randbytes(count)
