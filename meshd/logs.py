"""The format of a daemon's log, and the limit of what one source may write to it."""

import json
import logging
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    yield "time", datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    yield "level", record.levelname.lower()
    yield "logger", record.name
    yield "event", record.getMessage()
    for name, value in vars(record).items():
        if name not in _STANDARD:
            yield name, value
    if record.exc_info and record.exc_info[1]:
        yield "trace", "".join(traceback.format_exception(record.exc_info[1])).rstrip()


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(mark in text for mark in ' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class TextFormatter(logging.Formatter):
    """Formats an event as one line of key=value. A value with spaces or quotes is a JSON string."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_quoted(value)}" for name, value in _fields(record))


class JsonFormatter(logging.Formatter):
    """Formats an event as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(dict(_fields(record)), default=str, ensure_ascii=False)


_LINES = 20
_PERIOD_S = 10.0
_SOURCES = 1024


class LineLimit(logging.Filter):
    """Drops lines of a source that logs too much, so that nobody can fill the disk by causing errors.

    A source is a logger and a message before its arguments are filled in. Each may log `_LINES` lines in `_PERIOD_S`; the first
    line after that says in the field `dropped` how many there would have been. Debug lines are not limited: they are usually off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """When the period of each source began, and its lines since then; the least recently used source first."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        source = (record.name, record.msg if isinstance(record.msg, str) else type(record.msg).__name__)
        began, lines = self._sources.pop(source, (record.created, 0))
        if not 0 <= record.created - began < _PERIOD_S:
            if lines > _LINES:
                record.dropped = lines - _LINES
            began, lines = record.created, 0
        self._sources[source] = (began, lines + 1)
        if len(self._sources) > _SOURCES:
            self._sources.popitem(last=False)
        return lines < _LINES


_HANDLER = "meshd"


def configure_logging(level: str = "info", log_format: LogFormat = "text", *, stream: TextIO | None = None) -> None:
    """Log to `stream` (default: standard error), one line per event, with the fields of `extra`. The last call is valid.

    Events below `level` are dropped. If `level` is `info`, events of libraries below `warning` are dropped too.

    Raises: ValueError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is not a log level")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.set_name(_HANDLER)
    handler.addFilter(LineLimit())
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == _HANDLER]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.getLogger("meshd").setLevel(number)
