"""What happened to each session on this peer, for `meshd debug story`: a few lines a session, the oldest sessions dropped first."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from meshd.clock import Clock
from meshd.types import SessionId

_SESSIONS = 512
_LINES = 256
"""Of one session; the oldest go first, and how many is told."""


@dataclass(slots=True)
class _Lines:
    lines: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_LINES))
    dropped: int = 0


@dataclass(slots=True)
class Story:
    """Bounded notes on sessions, in this peer's monotonic time."""

    clock: Clock
    _sessions: OrderedDict[SessionId, _Lines] = field(default_factory=OrderedDict)

    def note(self, session: SessionId, what: str, **facts: object) -> None:
        """`{"at": monotonic seconds, "what": what, **facts}`; facts must be JSON-ready."""
        kept = self._sessions.get(session)
        if kept is None:
            kept = self._sessions[session] = _Lines()
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        kept.dropped += len(kept.lines) == _LINES
        kept.lines.append({"at": self.clock.monotonic(), "what": what, **facts})

    def lines(self, session: SessionId) -> list[dict[str, Any]]:
        """Oldest first; empty if nothing is known."""
        kept = self._sessions.get(session)
        if kept is None:
            return []
        missing = [{"at": kept.lines[0]["at"], "what": "dropped", "lines": kept.dropped}] if kept.dropped else []
        return [*missing, *kept.lines]
