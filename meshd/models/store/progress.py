"""Progress of a pull: counted in any thread, reported on the event loop."""

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
    """The phases of a pull."""

    WAITING = "waiting"
    """Another process pulls the same source; `done_bytes` are those that it has received."""
    FINDING = "finding"
    """The source is asked which files it has."""
    DOWNLOADING = "downloading"
    EXTRACTING = "extracting"
    IMPORTING = "importing"
    """A folder or a split file is converted to one GGUF file."""
    CHECKING = "checking"
    """The file is hashed."""
    FAILED = "failed"
    """This source failed, as `message` explains; the next one is tried."""
    NOTED = "noted"
    """`message` is something about the model that the user should know; the pull continues."""
    DONE = "done"
    ENDED = "ended"
    """The pull has failed or was stopped, as `message` explains."""


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a pull, to show to users."""

    model: str
    source: str
    phase: PullPhase
    done_bytes: int = 0
    """Bytes of this phase that are done."""
    total_bytes: int | None = None
    """None: unknown."""
    message: str = ""

    @property
    def share(self) -> float:
        """The fraction of the pull that is done; 0 in phases without a known size."""
        if self.phase is PullPhase.DONE:
            return 1.0
        counted = self.phase in (PullPhase.DOWNLOADING, PullPhase.IMPORTING)
        return self.done_bytes / self.total_bytes if counted and self.total_bytes else 0.0


ReportProgress = Callable[[PullProgress], None]


class ProgressMeter:
    """Counts bytes and reports them on the event loop that created it. `advance` reports at most ten times a second."""

    def __init__(self, model: str, report: ReportProgress) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._home = threading.get_ident()
        self._state = PullProgress(model=model, source="", phase=PullPhase.FINDING)
        self._lock = threading.Lock()
        self._reported_at = 0.0
        self._settled = 0
        self._stopped = False

    def begin(self, phase: PullPhase, *, source: object = None, done: int = 0, total: int | None = None, message: str = "") -> None:
        """Enter a phase and report it at once. `source` None: unchanged."""
        named = self._state.source if source is None else str(source)
        with self._lock:
            self._settled = 0
            self._state = PullProgress(
                model=self._state.model, source=named, phase=phase, done_bytes=done, total_bytes=total, message=message
            )
            self._send()

    def note(self, message: str) -> None:
        """Report something that the user should know, without leaving the phase."""
        with self._lock:
            self._send(msgspec.structs.replace(self._state, phase=PullPhase.NOTED, message=message))

    def advance(self, count: int) -> None:
        """Count `count` more bytes of this phase; any thread may call it. Raises: Cancelled after `stop`."""
        if self._stopped:
            raise Cancelled(f"the pull of {self._state.model} was stopped")
        with self._lock:
            done = self._state.done_bytes + count
            self._state = msgspec.structs.replace(self._state, done_bytes=done)
            if time.monotonic() - self._reported_at >= _INTERVAL_S or done == self._state.total_bytes:
                self._send()

    def restart(self, done: int) -> None:
        """Set the current file's count to `done`, when a download resumes or starts over."""
        with self._lock:
            self._state = msgspec.structs.replace(self._state, done_bytes=self._settled + done)

    def settle(self, count: int) -> None:
        """Count a finished file of `count` bytes. From now on, `restart` sets the count of the next file."""
        with self._lock:
            self._settled += count
            self._state = msgspec.structs.replace(self._state, done_bytes=self._settled)
            self._send()

    def stop(self) -> None:
        """Make the next `advance` raise, to end a thread's work."""
        self._stopped = True

    def _send(self, step: PullProgress | None = None) -> None:
        """Report `step`; None: the present state."""
        self._reported_at = time.monotonic()
        if threading.get_ident() == self._home:
            self._report(step or self._state)
        else:
            self._loop.call_soon_threadsafe(self._report, step or self._state)


async def in_thread(meter: ProgressMeter, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a function in a thread. The function must call `meter.advance` after each chunk, or be short.

    Cancel: the function stops at its next chunk and is awaited, so that nothing is written after this returns.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        meter.stop()
        await asyncio.wait([work])
        work.exception()
        raise
