"""How far a pull has come, told from whichever thread does the work."""

import asyncio
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import ParamSpec, TypeVar

import msgspec

from meshd.errors import Cancelled

_P = ParamSpec("_P")
_T = TypeVar("_T")
_INTERVAL_S = 0.1


class PullPhase(StrEnum):
    """What a pull is doing."""

    WAITING = "waiting"
    """Another process pulls the same thing: its bytes are told."""
    FINDING = "finding"
    """The source is asked what it has."""
    DOWNLOADING = "downloading"
    EXTRACTING = "extracting"
    IMPORTING = "importing"
    """A folder or a split file is made one GGUF file."""
    CHECKING = "checking"
    """The file's hash is computed."""
    FAILED = "failed"
    """This source, that is: `message` says why, and the next one is tried."""
    DONE = "done"


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a pull, for people."""

    model: str
    source: str
    phase: PullPhase
    done_bytes: int = 0
    """Of this phase."""
    total_bytes: int | None = None
    """None: not known."""
    message: str = ""


Tell = Callable[[PullProgress], None]


class ProgressMeter:
    """Counts bytes and tells them, at most ten times a second, on the event loop that made it."""

    def __init__(self, model: str, tell: Tell) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._home = threading.get_ident()
        self._state = PullProgress(model=model, source="", phase=PullPhase.FINDING)
        self._lock = threading.Lock()
        self._told_at = 0.0
        self._settled = 0
        self._stopped = False

    def begin(self, phase: PullPhase, *, source: object = None, done: int = 0, total: int | None = None, message: str = "") -> None:
        """Enter a phase; it is told at once. `source` stays as it was if it is None."""
        named = self._state.source if source is None else str(source)
        with self._lock:
            self._settled = 0
            self._state = PullProgress(
                model=self._state.model, source=named, phase=phase, done_bytes=done, total_bytes=total, message=message
            )
            self._send()

    def advance(self, count: int) -> None:
        """More bytes of this phase are done. From any thread. Raises: Cancelled after `stop`."""
        if self._stopped:
            raise Cancelled(f"the pull of {self._state.model} was stopped")
        with self._lock:
            done = self._state.done_bytes + count
            self._state = msgspec.structs.replace(self._state, done_bytes=done)
            if time.monotonic() - self._told_at >= _INTERVAL_S or done == self._state.total_bytes:
                self._send()

    def restart(self, done: int) -> None:
        """This phase stands at `done` bytes of the file at hand: a download goes on, or begins anew."""
        with self._lock:
            self._state = msgspec.structs.replace(self._state, done_bytes=self._settled + done)

    def settle(self, count: int) -> None:
        """A file of this phase is done, with `count` bytes; `restart` speaks of the next one."""
        with self._lock:
            self._settled += count
            self._state = msgspec.structs.replace(self._state, done_bytes=self._settled)
            self._send()

    def stop(self) -> None:
        """The next `advance` raises, which ends a thread's work."""
        self._stopped = True

    def _send(self) -> None:
        self._told_at = time.monotonic()
        if threading.get_ident() == self._home:
            self._tell(self._state)
        else:
            self._loop.call_soon_threadsafe(self._tell, self._state)


async def in_thread(meter: ProgressMeter, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a function that works file by file or chunk by chunk and calls `meter.advance` between.

    Cancel: the function is stopped at its next chunk and waited for, so that nothing writes once this has returned.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        meter.stop()
        await asyncio.wait([work])
        work.exception()
        raise
