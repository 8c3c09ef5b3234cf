"""Runs `meshd` and measures the CPU time that its event loop spends on events: makes them, keeps, relays and sends them.

Once a second a line of JSON is appended to `events_cpu.jsonl` in the state folder: the process's CPU time so far, and that for
events. Time is counted on the loop's thread, in the outermost of the functions below only.
"""

import asyncio
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

from meshd.agents.admin.event_relay import EventRelay
from meshd.agents.admin.plan_rows import PlanRows
from meshd.agents.observe.log_lines import LogLines
from meshd.agents.observe.rows import RowFeed
from meshd.agents.observe.stream import EventStream
from meshd.agents.observe.work import WorkMeter
from meshd.agents.placement.resident import HoldingChanges
from meshd.api import mesh

NAME = "events_cpu.jsonl"
_PERIOD_S = 1.0
_spent_s = 0.0
_depth = 0


class _Timed:
    """Counts the time that a coroutine computes, without the time that it waits."""

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self._inner = inner

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            with _counted():
                try:
                    waits = self._inner.throw(error) if error is not None else self._inner.send(value)
                except StopIteration as ended:
                    return ended.value
            value = error = None
            try:
                value = yield waits
            except BaseException as thrown:
                error = thrown


class _counted:
    """A context manager that counts its block, unless it is inside another one."""

    def __enter__(self) -> None:
        global _depth
        _depth += 1
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        global _depth, _spent_s
        _depth -= 1
        if _depth == 0:
            _spent_s += time.thread_time() - self._began


def _time(owner: Any, name: str) -> None:
    plain = getattr(owner, name)
    if asyncio.iscoroutinefunction(plain):

        @functools.wraps(plain)
        async def waits(*args: Any, **kwargs: Any) -> Any:
            return await _Timed(plain(*args, **kwargs))

        setattr(owner, name, waits)
        return

    @functools.wraps(plain)
    def runs(*args: Any, **kwargs: Any) -> Any:
        with _counted():
            return plain(*args, **kwargs)

    setattr(owner, name, runs)


def _report(path: Path) -> None:
    while True:
        time.sleep(_PERIOD_S)
        if path.parent.is_dir():
            with path.open("a") as lines:
                lines.write(json.dumps([time.monotonic(), time.process_time(), _spent_s]) + "\n")


def _main() -> int:
    on_loop: list[tuple[Any, Callable[..., Any]]] = [
        (mesh, mesh.events),  # the reader's whole request, with the writes to its socket
        (RowFeed, RowFeed.run),
        (EventRelay, EventRelay.run),
        (EventRelay, EventRelay._on_events),
        (EventRelay, EventRelay._on_watch),
        (WorkMeter, WorkMeter.run),
        (WorkMeter, WorkMeter.add),
        (EventStream, EventStream.publish),
        (HoldingChanges, HoldingChanges.changed),
        (PlanRows, PlanRows.of),
        (LogLines, LogLines._publish),
    ]
    for owner, function in on_loop:
        _time(owner, function.__name__)
    from meshd.cli import main

    state = Path(sys.argv[sys.argv.index("--state") + 1])
    threading.Thread(target=_report, args=(state / NAME,), daemon=True).start()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_main())
