"""An event loop in virtual time: instead of waiting, it sets its clock to the time of the next timer. Runs are reproducible.

A callback's context may name an owner, which is a process of a peer. Callbacks of a stopped owner are deferred, as in a frozen
process. Callbacks of a killed owner still run, but their errors are ignored.
"""

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")

_SAME_TIME_LIMIT = 200_000
"""Number of callbacks at one virtual time beyond which the code is taken to loop for ever."""
_WAKE = asyncio.futures._set_result_unless_cancelled  # type: ignore[attr-defined]
"""The timer of `asyncio.sleep`, each second callback of a quiet peer. It runs none of the owner's code: the task runs after it."""
_THREAD_S = 0.0005
"""Longest virtual time of a function in `run_in_executor`, in seconds."""


@dataclass(eq=False, slots=True)
class Owner:
    """The simulated process that callbacks and tasks belong to."""

    name: str
    stopped: bool = False
    """The process is frozen: its callbacks are appended to `deferred` instead of run."""
    killed: bool = False
    """The process has ended. Its cancelled tasks still run their clean-up, whose errors are ignored."""
    deferred: deque[asyncio.Handle] = field(default_factory=deque)
    tasks: dict[int, "SimTask"] = field(default_factory=dict)
    after: Callable[[], None] | None = None
    """Called after each callback of this owner that may change something."""

    def context(self) -> Context:
        """Return a new context. Callbacks and tasks that run in the context belong to this owner."""
        context = Context()
        context.run(OWNER.set, self)
        return context


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)


class Stuck(AssertionError):
    """The clock cannot advance: no timer is left, or callbacks schedule one another for ever at one virtual time."""


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its number, so that sets of tasks have the same order in every run."""

    number: int
    owner: Owner | None = None

    def __hash__(self) -> int:
        return self.number


class SimHandle(asyncio.TimerHandle):
    """A callback that is to run. As in asyncio, without what a simulated loop does not need: debugging, and a closed loop."""

    __slots__ = ()

    def __init__(  # super().__init__ is not called: it takes a tenth of the time of a run
        self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], loop: "SimLoop", context: Context | None
    ) -> None:
        self._callback, self._args, self._loop = callback, args, loop
        self._context = copy_context() if context is None else context
        self._cancelled = self._scheduled = False
        self._repr = self._source_traceback = None
        self._when = when

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None


class SimLoop(asyncio.BaseEventLoop):
    """The event loop of one run of the simulator."""

    def __init__(self, rng: random.Random, start: float = 1000.0) -> None:
        super().__init__()
        self.callbacks = 0
        """Number of callbacks run so far."""
        self.timers_run = 0
        """Number of timers that have fired, for example because a message arrived or a step finished."""
        self.stretch, self.longest_s = 1.0, 0.0
        """Factor of the peers' sleeps, and the longest sleep that it makes. Above 1 only while nothing happens for hours."""
        self.faults: list[str] = []
        """Errors that no code caught, and errors that meshd logged."""
        self._rng = rng
        self._virtual_now = start
        self._order = itertools.count()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count(1)
        self._at_this_instant = 0
        self._ready: deque[asyncio.Handle]
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._note_fault)

    def time(self) -> float:
        return self._virtual_now

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.TimerHandle:  # type: ignore[override]
        handle = SimHandle(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._order), handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._virtual_now + delay, callback, *args, context=context)

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = SimHandle(self._virtual_now, callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run `func` on this thread after a random time of at most `_THREAD_S`."""
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
        """Let a stopped owner continue: run its deferred callbacks, in order."""
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
                only_wakes = handle._callback is _WAKE  # type: ignore[attr-defined]
                handle._run()
                if owner.after is not None and not only_wakes:
                    owner.after()
            self.callbacks += 1
            self._at_this_instant += 1
        if self._at_this_instant > _SAME_TIME_LIMIT:
            self._at_this_instant = 0
            raise Stuck(f"{_SAME_TIME_LIMIT} callbacks at {self._virtual_now:.6f}: the clock does not advance")

    def _advance(self) -> None:
        while self._timers and self._timers[0][2]._cancelled:
            heappop(self._timers)
        if not self._timers:
            raise Stuck(f"nothing is left to happen at {self._virtual_now:.6f}")
        if self._timers[0][0] > self._virtual_now:
            self._virtual_now = self._timers[0][0]
            self._at_this_instant = 0

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T] | Generator[Any, None, T], **named: Any
    ) -> SimTask:
        number = next(self._numbers)
        SimTask.number = number  # the constructor hashes the task before `task.number` can be set
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
        if owner is not None and owner.killed:
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
    """One peer's clock and random bytes. Its monotonic clock starts at a random value, its wall clock is off by up to 30 s."""

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
        seconds = max(seconds, min(seconds * self._loop.stretch, self._loop.longest_s))
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = self._loop.create_future()
        timer = self._loop.call_later(seconds, _WAKE, woken, None)
        try:
            await woken
        finally:
            timer.cancel()

    def random_bytes(self, count: int) -> bytes:
        return self._rng.randbytes(count)
