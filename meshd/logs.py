"""The format of a daemon's log, and the limit of what one source may write to it."""

import json
import logging
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal, TextIO

from meshd.errors import StorageError

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


class JournalFormatter(TextFormatter):
    """Formats an event for systemd's journal: its priority (sd-daemon(3)), and no time, which the journal adds."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return f"<{priority}>" + " ".join(f"{name}={_quoted(value)}" for name, value in _fields(record) if name != "time")


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


class _LostLines(logging.Handler):
    """Counts the lines that could not be written, such as on a full disk. The next line that can be written has their number.

    A daemon must go on without its log. The standard library would print a traceback for each lost line.
    """

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # the standard library's name
        self.lost += 1

    def emit(self, record: logging.LogRecord) -> None:
        before = self.lost
        if before:
            record.lost = before
        super().emit(record)
        if self.lost == before:
            self.lost = 0


class StreamLog(_LostLines, logging.StreamHandler[TextIO]):
    """Writes the log to a stream."""


class FileLog(_LostLines, RotatingFileHandler):
    """Writes the log to a file, which is renamed to `FILE.1` when it is full; of older ones four are kept."""

    def __init__(self, path: Path) -> None:
        """Raises: StorageError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path} can't be written: {error.strerror}", hint="name another file with --log-file") from error

    def reopen(self) -> None:
        """Open the file anew, because another program has renamed it."""
        self.acquire()
        try:
            with suppress(OSError):  # a full disk does not take the last lines
                self.close()
            self.stream = self._open()
        except OSError:
            self.lost += 1
        finally:
            self.release()


FILE_BYTES, OLD_FILES = 10 * 10**6, 4
"""A daemon at level `info` writes about 1 MB in a day of an answer each minute: the log of some weeks is kept."""
_HANDLER = "meshd"


def reopen_file() -> None:
    """Open the log's file anew, if the log is in a file: another program may have renamed it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, FileLog):
            handler.reopen()


def configure_logging(
    level: str = "info",
    log_format: LogFormat = "text",
    *,
    stream: TextIO | None = None,
    file: Path | None = None,
    journal: bool = False,
) -> None:
    """Log to `file`, or to `stream` (default: standard error), one line per event, with the fields of `extra`.

    The last call is valid. Events below `level` are dropped. If `level` is `info`, events of libraries below `warning` are dropped
    too. `journal`: standard error goes to systemd's journal.

    Raises: ValueError for an unknown level, StorageError if the file can't be opened.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is not a log level")
    handler = FileLog(file) if file is not None else StreamLog(stream or sys.stderr)
    handler.set_name(_HANDLER)
    handler.addFilter(LineLimit())
    text = JournalFormatter() if journal and file is None else TextFormatter()
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == _HANDLER]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.getLogger("meshd").setLevel(number)
