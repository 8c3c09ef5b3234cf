"""Which of the steps that are ready a peer computes next."""

from collections import deque
from dataclasses import dataclass, field

from meshd.agents.stage.session import Step
from meshd.agents.stage.steps import ActiveStage

_DECODES_PER_PREFILL = 8
"""Decodes that may go first before one waiting prefill step has its turn."""


@dataclass(slots=True)
class Scheduler:
    """Steps that are ready: decodes first, then prefill, each first come first served.

    A session has one step here at most: the queue is as long as there are sessions, and each waits for one step of every other.
    """

    _decodes: deque[tuple[ActiveStage, Step]] = field(default_factory=deque)
    _prefills: deque[tuple[ActiveStage, Step]] = field(default_factory=deque)
    _decodes_in_row: int = 0

    def put(self, active: ActiveStage, step: Step) -> None:
        """A step that may be computed now."""
        (self._prefills if step.prefill else self._decodes).append((active, step))

    def take(self) -> tuple[ActiveStage, Step] | None:
        """The next one; prefill has its turn after some decodes, so that a new session is never starved by running ones."""
        if self._prefills and (not self._decodes or self._decodes_in_row >= _DECODES_PER_PREFILL):
            self._decodes_in_row = 0
            return self._prefills.popleft()
        if not self._decodes:
            return None
        self._decodes_in_row += 1
        return self._decodes.popleft()
