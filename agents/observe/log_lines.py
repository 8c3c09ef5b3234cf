"""Publishes the lines of this process's log as events."""

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from meshd.agents.budget import TokenBucket
from meshd.agents.observe.events import LogLine
from meshd.agents.observe.stream import EventStream
from meshd.clock import Clock

LINES_PER_S, LINES_AT_ONCE = 20.0, 200
"""Further lines are in the log, but not among the events."""
_SESSION = re.compile(r"\bsession ([0-9a-f]{32})\b")
Level = Literal["debug", "info", "warning", "error"]


class LogLines(logging.Handler):
    """A log handler for the event loop's thread. Lines of other threads are handed to it."""

    def __init__(
        self, stream: EventStream, clock: Clock, loop: asyncio.AbstractEventLoop, on_line: Callable[[Level], None]
    ) -> None:
        super().__init__(logging.INFO)
        self._on_line = on_line
        self._stream, self._clock, self._loop = stream, clock, loop
        self._budget = TokenBucket(LINES_PER_S, LINES_AT_ONCE)

    def emit(self, record: logging.LogRecord) -> None:
        """Publish a line."""
        self._on_line(_level(record.levelno))
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # the arguments don't fit the message: what logs it must not fail
            text = str(record.msg)
        session = _SESSION.search(text)
        line = LogLine(level=_level(record.levelno), logger=record.name, text=text, session=session[1] if session else "")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self._publish(line)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._publish, line)

    def _publish(self, line: LogLine) -> None:
        if self._budget.take(self._clock.monotonic()):
            self._stream.publish(line)


@contextmanager
def published(stream: EventStream, clock: Clock, on_line: Callable[[Level], None] = lambda level: None) -> Iterator[None]:
    """Publish the lines that meshd logs inside the block. Must be called inside the event loop.

    on_line: called with the level of each line, on any thread, also of those that are too many to be published.
    """
    logger, handler = logging.getLogger("meshd"), LogLines(stream, clock, asyncio.get_running_loop(), on_line)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _level(number: int) -> Level:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"
