"""What happened in a run, as a running checksum and, if wanted, as lines."""

import logging
import zlib
from collections import deque
from collections.abc import Callable

from meshd.protocol.messages import Message
from meshd.types import PeerId

_TOLD = ("session", "epoch", "step", "index", "token", "stage", "position", "held", "start", "request", "code", "layers")


class Trace:
    """The same seed must give the same `digest`."""

    def __init__(self, now: Callable[[], float], names: dict[PeerId, str], *, keep: int = 0, echo: bool = False) -> None:
        self.digest = 0
        self._now = now
        self._names = names
        self._echo = echo
        self.lines: deque[str] = deque(maxlen=keep)
        self._told: dict[type[Message], tuple[str, ...]] = {}

    def note(self, *parts: object) -> None:
        line = f"{self._now():.6f} " + " ".join(map(str, parts))
        self.digest = zlib.crc32(line.encode(), self.digest)
        self.lines.append(line)
        if self._echo:
            print(line, flush=True)

    def log(self, who: str, record: logging.LogRecord) -> None:
        """A line of the product's own log: not part of the digest, since how much is logged is not behaviour."""
        line = f"{self._now():.6f} {who} log {record.levelname.lower()}: {record.getMessage()}"
        self.lines.append(line)
        if self._echo:
            print(line, flush=True)

    def message(self, source: PeerId, target: PeerId, message: Message) -> None:
        kind = type(message)
        told = self._told.get(kind)
        if told is None:
            told = self._told[kind] = tuple(name for name in _TOLD if name in kind.__struct_fields__)
        facts = [f"{name}={_short(getattr(message, name))}" for name in told]
        self.note(self._names[source], ">", self._names[target], kind.__name__, *facts)


def _short(value: object) -> str:
    text = str(value)
    return text[:6] if len(text) == 32 else text
