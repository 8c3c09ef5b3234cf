"""Chooses which ready step is computed next."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from meshd.agents.stage.session import Step
from meshd.agents.stage.steps import ActiveStage

_DECODES_PER_PREFILL = 8
"""Maximum number of decode steps computed in a row while a prefill step waits."""


@dataclass(slots=True)
class Scheduler:
    """The queue of ready steps: decodes before prefills, first in, first out within each kind.

    A stage has at most one ready step, so the number of stages bounds the queue.
    """

    _decodes: deque[tuple[ActiveStage, Step]] = field(default_factory=deque)
    _prefills: deque[tuple[ActiveStage, Step]] = field(default_factory=deque)
    _decodes_in_row: int = 0

    def put(self, active: ActiveStage, step: Step) -> None:
        (self._prefills if step.prefill else self._decodes).append((active, step))

    def take(self, must_wait: Callable[[ActiveStage, Step], bool] = lambda stage, step: False) -> tuple[ActiveStage, Step] | None:
        """Remove and return the next step. After eight decodes a waiting prefill is next, so that new sessions never starve.

        must_wait: whether a prefill step has to wait because there is no room for its output. Steps behind it may be taken.
        Returns: the stage and its step; None if no step is ready.
        """
        if self._prefills and (not self._decodes or self._decodes_in_row >= _DECODES_PER_PREFILL):
            ready = next((job for job in self._prefills if not must_wait(*job)), None)
            if ready is not None:
                self._prefills.remove(ready)
                self._decodes_in_row = 0
                return ready
        if not self._decodes:
            return None
        self._decodes_in_row += 1
        return self._decodes.popleft()
