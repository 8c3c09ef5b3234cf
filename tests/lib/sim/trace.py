"""The trace of a run: a checksum of all events, and lines of text if wanted."""

import logging
import zlib
from collections import deque
from collections.abc import Callable

from meshd.protocol.messages import Message
from meshd.types import PeerId

_FIELDS = ("session", "epoch", "step", "index", "token", "stage", "position", "held", "start", "request", "code", "layers")
"""Fields of messages that the trace shows."""


class Trace:
    """Records all events of a run as lines. Runs with the same seed and options must have the same `digest`."""

    def __init__(self, now: Callable[[], float], names: dict[PeerId, str], *, keep: int = 0, echo: bool = False) -> None:
        self.digest = 0
        self._now = now
        self._names = names
        self._echo = echo
        self.lines: deque[str] = deque(maxlen=keep)
        self._fields: dict[type[Message], tuple[str, ...]] = {}
        """The fields that the trace shows, by type of message."""

    def note(self, *parts: object) -> None:
        line = f"{self._now():.6f} " + " ".join(map(str, parts))
        self.digest = zlib.crc32(line.encode(), self.digest)
        self.lines.append(line)
        if self._echo:
            print(line, flush=True)

    def log(self, who: str, record: logging.LogRecord) -> None:
        """Add a line of meshd's own log. It does not change the digest, because the log is not behaviour."""
        line = f"{self._now():.6f} {who} log {record.levelname.lower()}: {record.getMessage()}"
        self.lines.append(line)
        if self._echo:
            print(line, flush=True)

    def message(self, source: PeerId, target: PeerId, message: Message) -> None:
        kind = type(message)
        fields = self._fields.get(kind)
        if fields is None:
            fields = self._fields[kind] = tuple(name for name in _FIELDS if name in kind.__struct_fields__)
        values = [f"{name}={_short(getattr(message, name))}" for name in fields]
        self.note(self._names[source], ">", self._names[target], kind.__name__, *values)


def _short(value: object) -> str:
    text = str(value)
    return text[:6] if len(text) == 32 else text
