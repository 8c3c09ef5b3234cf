"""Notes of what happened to each session on this peer, for `meshd debug story`. Their number and their bytes are limited."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meshd.clock import Clock
from meshd.types import SessionId

_SESSIONS = 512
_LINES = 256
"""Maximum number of lines of one session. The oldest are dropped first, and counted."""
_TEXT = 500
"""Characters of a text that a line keeps. Texts may come from peers: the reason of a CLOSE, the message of an error."""
_LINE_BYTES = 4096
"""A longer line keeps only what happened, without its facts."""
_BYTES = 16 << 20
"""Maximum bytes of all lines together. The oldest sessions are dropped first."""


@dataclass(slots=True)
class _Lines:
    lines: deque[bytes] = field(default_factory=deque)
    """JSON objects."""
    size: int = 0
    dropped: int = 0


@dataclass(slots=True)
class Story:
    """Keeps the notes on the newest sessions. Each line has this peer's monotonic time."""

    clock: Clock
    size: int = 0
    """Bytes of all lines."""
    _sessions: OrderedDict[SessionId, _Lines] = field(default_factory=OrderedDict)

    def note(self, session: SessionId, what: str, **facts: object) -> None:
        """Add the line `{"at": monotonic seconds, "what": what, **facts}`. Facts must be JSON-ready."""
        notes = self._sessions.get(session)
        if notes is None:
            notes = self._sessions[session] = _Lines()
        line = _encoded(self.clock.monotonic(), what, facts)
        notes.lines.append(line)
        notes.size += len(line)
        self.size += len(line)
        if len(notes.lines) > _LINES:
            oldest = len(notes.lines.popleft())
            notes.size -= oldest
            self.size -= oldest
            notes.dropped += 1
        while len(self._sessions) > _SESSIONS or (self.size > _BYTES and len(self._sessions) > 1):
            self.size -= self._sessions.popitem(last=False)[1].size

    def lines(self, session: SessionId) -> list[dict[str, Any]]:
        """Returns: the session's lines, oldest first, after a line that counts the dropped ones; empty if there are no notes."""
        notes = self._sessions.get(session)
        if notes is None:
            return []
        lines: list[dict[str, Any]] = [msgspec.json.decode(line) for line in notes.lines]
        missing = [{"at": lines[0]["at"], "what": "dropped", "lines": notes.dropped}] if notes.dropped else []
        return [*missing, *lines]


def _encoded(at: float, what: str, facts: dict[str, object]) -> bytes:
    short = {name: fact[:_TEXT] if isinstance(fact, str) else fact for name, fact in facts.items()}
    line = msgspec.json.encode({"at": at, "what": what, **short})
    return line if len(line) <= _LINE_BYTES else msgspec.json.encode({"at": at, "what": what, "facts": "too long to be kept"})
