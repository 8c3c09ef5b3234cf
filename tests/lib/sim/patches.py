"""Replaces the module `time` in meshd's modules and the handlers of meshd's log during a run."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from meshd.agents.placement import client
from sim.loop import OWNER, SimLoop
from sim.toy.backend import Meter
from sim.trace import Trace


@contextmanager
def virtual_time(loop: SimLoop, meter: Meter) -> Iterator[None]:
    """Inside the block, replace the module `time` in all of meshd's modules by functions that return virtual time."""

    def now() -> float:
        return loop.time() + meter.spent_s

    def now_ns() -> int:
        return int(now() * 1e9)

    def sleep(seconds: float) -> None:
        meter.spent_s += seconds

    shim = SimpleNamespace(perf_counter=now, monotonic=now, time=now, perf_counter_ns=now_ns, monotonic_ns=now_ns, sleep=sleep)
    patched = [
        module for name, module in list(sys.modules.items()) if name.startswith("meshd.") and getattr(module, "time", None) is time
    ]
    for module in patched:
        module.time = shim  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in patched:
            module.time = time  # type: ignore[attr-defined]


@contextmanager
def kv_for(contexts: int) -> Iterator[None]:
    """Inside the block, let placements reserve KV for at most this many whole contexts. 0: for as many as usual."""
    usual = client.CONTEXTS_OF_KV
    client.CONTEXTS_OF_KV = contexts or usual
    try:
        yield
    finally:
        client.CONTEXTS_OF_KV = usual


class _Watcher(logging.Handler):
    """Writes log records to the trace. An error that a running peer logs makes the run fail."""

    def __init__(self, loop: SimLoop, trace: Trace) -> None:
        super().__init__(logging.DEBUG)
        self._loop, self._trace = loop, trace

    def emit(self, record: logging.LogRecord) -> None:
        owner = OWNER.get()
        if owner is not None and owner.killed:
            return
        self._trace.log(owner.name if owner else "-", record)
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            where = "" if error is None or error.__traceback__ is None else _where(error)
            self._loop.faults.append(f"{owner.name if owner else '-'} logs: {record.getMessage()} {error!r}{where}")


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


@contextmanager
def watched_log(loop: SimLoop, trace: Trace) -> Iterator[None]:
    """Inside the block, send meshd's log to the trace, and its errors also to `SimLoop.faults`."""
    logger = logging.getLogger("meshd")
    before = logger.level, logger.propagate, logger.handlers[:]
    watcher = _Watcher(loop, trace)
    logger.handlers[:] = [watcher]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if trace.lines.maxlen else logging.ERROR)
    try:
        yield
    finally:
        logger.level, logger.propagate, logger.handlers[:] = before
        logger.setLevel(before[0])
