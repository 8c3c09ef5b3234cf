"""Notes of what happened to each session on this peer, for `meshd debug story`. The number of lines and of sessions is limited."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from meshd.clock import Clock
from meshd.types import SessionId

_SESSIONS = 512
_LINES = 256
"""Maximum number of lines of one session. The oldest are dropped first, and counted."""


@dataclass(slots=True)
class _Lines:
    lines: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LINES))
    dropped: int = 0


@dataclass(slots=True)
class Story:
    """Keeps the notes on the newest sessions. Each line has this peer's monotonic time."""

    clock: Clock
    _sessions: OrderedDict[SessionId, _Lines] = field(default_factory=OrderedDict)

    def note(self, session: SessionId, what: str, **facts: object) -> None:
        """Add the line `{"at": monotonic seconds, "what": what, **facts}`. Facts must be JSON-ready."""
        notes = self._sessions.get(session)
        if notes is None:
            notes = self._sessions[session] = _Lines()
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        notes.dropped += len(notes.lines) == _LINES
        notes.lines.append({"at": self.clock.monotonic(), "what": what, **facts})

    def lines(self, session: SessionId) -> list[dict[str, Any]]:
        """Returns: the session's lines, oldest first, after a line that counts the dropped ones; empty if there are no notes."""
        notes = self._sessions.get(session)
        if notes is None:
            return []
        missing = [{"at": notes.lines[0]["at"], "what": "dropped", "lines": notes.dropped}] if notes.dropped else []
        return [*missing, *notes.lines]
