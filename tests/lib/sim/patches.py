"""What is replaced in meshd's modules during a run: time, the handlers of the log, and what the checks look at."""

import asyncio
import logging
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from meshd.agents.observe.story import Story
from meshd.agents.placement import client
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.session.answer import Answer
from meshd.agents.stage.flow.events import Command, Event
from meshd.agents.stage.flow.session import StageSession
from meshd.kernels.backend import Stage
from meshd.types import PeerId, SessionId
from sim.loop import OWNER, SimLoop
from sim.toy.backend import Meter
from sim.trace import Trace

if TYPE_CHECKING:
    from sim.world import World


@contextmanager
def patched(world: "World") -> Iterator[None]:
    """Inside the block, all that a run of this world needs is replaced."""
    with ExitStack() as stack:
        stack.enter_context(virtual_time(world.loop, world.meter))
        stack.enter_context(watched_log(world.loop, world.trace))
        stack.enter_context(checked_machines(world.loop))
        stack.enter_context(kv_for(world.options.contexts))
        stack.enter_context(slow_preparation(world.rng_cluster))
        stack.enter_context(noted_numerics(world.numerics))
        stack.enter_context(checked_stalls(world))
        yield


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


@dataclass(slots=True)
class NumericsNotes:
    """What the stories of all peers say about the numerics of sessions. Kept when a peer is killed."""

    planned: defaultdict[SessionId, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Session -> the ids with which it was planned."""
    mixed: set[SessionId] = field(default_factory=set)
    """Sessions with a plan over several ids, or with layers that changed theirs."""


@contextmanager
def noted_numerics(notes: NumericsNotes) -> Iterator[None]:
    """Inside the block, collect what stories say about numerics."""
    note = Story.note

    def noted(story: Story, session: SessionId, what: str, **facts: Any) -> None:
        if what == "planned":
            ids = facts["numerics"].split(", ")
            notes.planned[session].update(ids)
            if len(ids) > 1:
                notes.mixed.add(session)
        elif what == "numerics change":
            notes.mixed.add(session)
        note(story, session, what, **facts)

    Story.note = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Story.note = note  # type: ignore[method-assign]


@contextmanager
def checked_machines(loop: SimLoop) -> Iterator[None]:
    """Inside the block, check the invariants of a stage's machine after each of its events. A broken one makes the run fail."""
    usual = StageSession.handle

    def handle(machine: StageSession, event: Event) -> list[Command]:
        commands = usual(machine, event)
        try:
            machine.validate()
        except AssertionError as error:
            loop.faults.append(f"after {type(event).__name__}: {error}")
        return commands

    StageSession.handle = handle  # type: ignore[method-assign]
    try:
        yield
    finally:
        StageSession.handle = usual  # type: ignore[method-assign]


@contextmanager
def checked_stalls(world: "World") -> Iterator[None]:
    """Inside the block, a run fails if an answer stalls by no peer's fault, and no peer of it has one, or had one since it began.

    `Checks` does the same where a peer is blamed.
    """
    usual = Answer.overdue

    def overdue(answer: Answer, reason: str, blame: PeerId | None) -> None:
        peers = {answer.context.me, *(answer.plan.peers if answer.plan is not None else ())}
        if blame is None and not any(world.health.was_affected(peer, answer.output.started) for peer in peers):
            world.loop.faults.append(f"session {answer.session} stalls, though no peer of it has a fault: {reason}")
        usual(answer, reason, blame)

    Answer.overdue = overdue  # type: ignore[method-assign]
    try:
        yield
    finally:
        Answer.overdue = usual  # type: ignore[method-assign]


@contextmanager
def kv_for(contexts: int) -> Iterator[None]:
    """Inside the block, let placements reserve KV for at most this many whole contexts. 0: for as many as usual."""
    usual = client.CONTEXTS_OF_KV
    client.CONTEXTS_OF_KV = contexts or usual
    try:
        yield
    finally:
        client.CONTEXTS_OF_KV = usual


@contextmanager
def slow_preparation(rng: random.Random) -> Iterator[None]:
    """Inside the block, it takes up to a second to read the weights that a stage needs of its own."""
    usual = SharedStages._read

    async def read(stages: SharedStages, *given: Any) -> Stage:
        await asyncio.sleep(rng.random())
        return await usual(stages, *given)

    SharedStages._read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        SharedStages._read = usual  # type: ignore[method-assign]


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
