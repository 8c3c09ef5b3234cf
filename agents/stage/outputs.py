"""Keeps the outputs that stages sent, within a budget of bytes. A replacement of a lost next stage needs the outputs again."""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field

from meshd.errors import LocalFault

_PART_BYTES = 160
"""Bytes that a part takes in addition to its rows."""
_TRIM_SHARE = 8
"""A log that alone exceeds the budget is trimmed until 1/8 of the budget is free, so that not every step has to trim."""


@dataclass(slots=True, eq=False)
class OutputLog:
    """One session's outputs of one stage for positions `[kept_from, kept_to)`, encoded as they were sent."""

    dtype: str
    """How they are encoded. An epoch whose plan has another wire dtype does not use the log."""
    kept_to: int = 0
    row_bytes: int = 0
    """Bytes of one position's output. 0: nothing was kept yet."""
    pinned: bool = False
    """Whether eviction skips this log, because OPENED offered its outputs and they may still have to be sent."""
    starts: list[int] = field(default_factory=list)
    """Position of the first row of each part."""
    parts: list[memoryview] = field(default_factory=list)
    """What each step put out."""

    @property
    def kept_from(self) -> int:
        return self.starts[0] if self.starts else self.kept_to

    def rows(self, start: int, end: int) -> memoryview:
        """Return the outputs of positions `[start, end)`. Raises: LocalFault if some are not kept."""
        if not self.kept_from <= start < end <= self.kept_to:
            raise LocalFault(f"outputs {self.kept_from} to {self.kept_to} are kept, not those from {start} to {end}")
        first = bisect_right(self.starts, start) - 1
        chosen: list[memoryview] = []
        for index in range(first, bisect_left(self.starts, end)):
            offset = self.starts[index]
            chosen.append(self.parts[index][max(0, start - offset) * self.row_bytes : (end - offset) * self.row_bytes])
        return chosen[0] if len(chosen) == 1 else memoryview(b"".join(chosen))


@dataclass(slots=True)
class Outputs:
    """All output logs of this peer, within a budget of bytes. The least recently used log is evicted first."""

    limit_bytes: int
    used_bytes: int = 0
    _logs: "OrderedDict[int, OutputLog]" = field(default_factory=OrderedDict)

    def open(self, dtype: str) -> OutputLog:
        """Add an empty log for outputs encoded in `dtype`."""
        log = OutputLog(dtype)
        self._logs[id(log)] = log
        return log

    def append(self, log: OutputLog, position: int, tokens: int, payload: memoryview) -> None:
        """Append the outputs of `tokens` tokens, in place of those from `position` on. A log that ends before is cleared.

        The payload is not copied, so it must not change afterwards.
        """
        self.cut(log, position)
        if position != log.kept_to:
            self._clear(log)
            log.kept_to = position
        log.starts.append(position)
        log.parts.append(payload)
        log.kept_to, log.row_bytes = position + tokens, payload.nbytes // tokens
        self.used_bytes += _size(payload)
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
            kept = bytes(last[: (end - log.starts[-1]) * log.row_bytes])  # a view would keep the whole part in memory
            log.parts[-1] = memoryview(kept)
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


def _size(part: memoryview) -> int:
    return part.nbytes + _PART_BYTES
