"""Keeps the outputs that stages sent, within a budget of bytes. A replacement of a lost next stage needs the outputs again."""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault

F32 = npt.NDArray[np.float32]

_PART_BYTES = 160
"""Bytes that an array takes in addition to its values."""
_TRIM_SHARE = 8
"""A log that alone exceeds the budget is trimmed until 1/8 of the budget is free, so that not every step has to trim."""


@dataclass(slots=True, eq=False)
class OutputLog:
    """One session's outputs of one stage for positions `[kept_from, kept_to)`, as the arrays that the steps computed."""

    kept_to: int = 0
    pinned: bool = False
    """Whether eviction skips this log, because OPENED offered its outputs and they may still have to be sent."""
    starts: list[int] = field(default_factory=list)
    """Position of the first row of each array in `parts`."""
    parts: list[F32] = field(default_factory=list)

    @property
    def kept_from(self) -> int:
        return self.starts[0] if self.starts else self.kept_to

    def rows(self, start: int, end: int) -> F32:
        """Return the outputs of positions `[start, end)` as `[tokens, hidden]`. Raises: LocalFault if some are not kept."""
        if not self.kept_from <= start < end <= self.kept_to:
            raise LocalFault(f"outputs {self.kept_from} to {self.kept_to} are kept, not those from {start} to {end}")
        first = bisect_right(self.starts, start) - 1
        chosen: list[F32] = []
        for index in range(first, bisect_left(self.starts, end)):
            offset = self.starts[index]
            chosen.append(self.parts[index][max(0, start - offset) : end - offset])
        return chosen[0] if len(chosen) == 1 else np.concatenate(chosen)


@dataclass(slots=True)
class Outputs:
    """All output logs of this peer, within a budget of bytes. The least recently used log is evicted first."""

    limit_bytes: int
    used_bytes: int = 0
    _logs: "OrderedDict[int, OutputLog]" = field(default_factory=OrderedDict)

    def open(self) -> OutputLog:
        """Add an empty log."""
        log = OutputLog()
        self._logs[id(log)] = log
        return log

    def append(self, log: OutputLog, position: int, hidden: F32) -> None:
        """Append a step's outputs `[tokens, hidden]`. If `position` is not the log's end, the log is cleared first.

        The array is not copied, so it must not change afterwards.
        """
        if position != log.kept_to:
            self._clear(log)
            log.kept_to = position
        log.starts.append(position)
        log.parts.append(hidden)
        log.kept_to = position + len(hidden)
        self.used_bytes += _size(hidden)
        self._logs.move_to_end(id(log))
        if self.used_bytes > self.limit_bytes:
            self._evict(log)

    def cut(self, log: OutputLog, end: int) -> None:
        """Drop the outputs from position `end` on."""
        while log.parts and log.starts[-1] >= end:
            self.used_bytes -= _size(log.parts.pop())
            log.starts.pop()
        if log.parts and log.kept_to > end:
            last = log.parts[-1]
            log.parts[-1] = last[: end - log.starts[-1]].copy()  # a view would keep the whole array in memory
            self.used_bytes -= last.nbytes - log.parts[-1].nbytes
        log.kept_to = min(log.kept_to, end)

    def drop(self, log: OutputLog) -> None:
        """Drop a log. Idempotent."""
        if self._logs.pop(id(log), None) is not None:
            self._clear(log)

    def _evict(self, newest: OutputLog) -> None:
        """Clear the least recently used logs, except pinned ones; if that is not enough, trim the beginning of `newest`."""
        for log in list(self._logs.values()):
            if self.used_bytes <= self.limit_bytes:
                return
            if log is not newest and not log.pinned:
                self._clear(log)
        goal = self.limit_bytes - self.limit_bytes // _TRIM_SHARE
        count = 0
        while self.used_bytes > goal and count < len(newest.parts):
            self.used_bytes -= _size(newest.parts[count])
            count += 1
        del newest.parts[:count], newest.starts[:count]

    def _clear(self, log: OutputLog) -> None:
        self.used_bytes -= sum(map(_size, log.parts))
        log.parts.clear()
        log.starts.clear()


def _size(part: F32) -> int:
    return part.nbytes + _PART_BYTES
