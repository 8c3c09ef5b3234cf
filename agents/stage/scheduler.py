"""Which of the steps that are ready a peer computes next."""

from collections import deque
from dataclasses import dataclass, field

from meshd.agents.stage.session import Step
from meshd.agents.stage.steps import ActiveStage

_DECODES_PER_PREFILL = 8
"""Decode steps in a row while a prefill step waits."""


@dataclass(slots=True)
class Scheduler:
    """Steps that are ready: decodes before prefills, each first come first served.

    A session has one step here at most, so the queue is no longer than the number of sessions.
    """

    _decodes: deque[tuple[ActiveStage, Step]] = field(default_factory=deque)
    _prefills: deque[tuple[ActiveStage, Step]] = field(default_factory=deque)
    _decodes_in_row: int = 0

    def put(self, active: ActiveStage, step: Step) -> None:
        """Queue a step."""
        (self._prefills if step.prefill else self._decodes).append((active, step))

    def take(self) -> tuple[ActiveStage, Step] | None:
        """Take the next step. A prefill goes after some decodes, so that running sessions never starve a new one.

        Returns: None if no step is ready.
        """
        if self._prefills and (not self._decodes or self._decodes_in_row >= _DECODES_PER_PREFILL):
            self._decodes_in_row = 0
            return self._prefills.popleft()
        if not self._decodes:
            return None
        self._decodes_in_row += 1
        return self._decodes.popleft()
