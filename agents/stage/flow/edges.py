"""The two ends of an edge between stages: numbers, credit and repeats of its steps (SPEC.md, section 8).

The sender numbers the steps of an edge, and sends one only with credit. The receiver brings the steps into order, and grants credit
for as many steps as it has room for. What is on its way when a link breaks is sent again by the link (`agents/links/restoring`).
"""

from collections import deque
from dataclasses import dataclass, field, replace

from meshd.agents.stage.flow.events import SentStep, StageStep
from meshd.protocol.messages import STEP_WINDOW, StepKind


@dataclass(slots=True)
class InputEdge:
    """The receiving end: steps that have arrived and are not in order yet."""

    next_seq: int = 0
    """Number of the next step in order."""
    begun: int = 0
    """Steps before this number have begun or were dropped, so that their room is free."""
    early: dict[int, StageStep] = field(default_factory=dict)
    """Steps that arrived and have not been taken, by number."""

    @property
    def credit(self) -> int:
        """Steps before this number may be sent."""
        return self.begun + STEP_WINDOW

    def is_repeat(self, step: StageStep) -> bool:
        """Whether this step has arrived before."""
        return step.seq < self.next_seq or step.seq in self.early

    def put(self, step: StageStep) -> bool:
        """Keep a step until it is its turn. Returns: False if its sender had no credit for it."""
        if step.seq >= self.credit:
            return False
        self.early[step.seq] = step
        return True

    def take(self) -> StageStep | None:
        """Remove and return the next step in order. Returns: None if it has not arrived."""
        step = self.early.pop(self.next_seq, None)
        if step is not None:
            self.next_seq += 1
        return step


@dataclass(slots=True)
class OutputEdge:
    """The sending end: the number of the next step, and its credit."""

    next_seq: int = 0
    waiting: deque[tuple[int, StageStep]] = field(default_factory=deque)
    """Steps that the receiver may not have begun, with their numbers. It has room for so many."""

    @property
    def credit(self) -> int:
        """Steps before this number may be sent."""
        return self.next_seq - len(self.waiting) + STEP_WINDOW

    @property
    def open(self) -> bool:
        """Whether there is credit for one more step."""
        return len(self.waiting) < STEP_WINDOW

    def add(self, step: StageStep, output: object, skip: int = 0) -> SentStep:
        """Number a step that is sent now."""
        sent = SentStep(self.next_seq, replace(step, data=None), output, skip)  # what arrived need not stay in memory
        self.waiting.append((sent.seq, sent.step))
        self.next_seq += 1
        return sent

    def acknowledge(self, next_seq: int, credit: int) -> None:
        """Take from an ACK that the steps before `next_seq` have arrived, and that steps up to `credit` may be sent."""
        self._begun(min(credit, next_seq + STEP_WINDOW) - STEP_WINDOW)

    def sampled_at(self, position: int) -> None:
        """Conclude from a token at `position` that every later stage has begun the step that it was sampled after.

        So decode steps need no ACK. Of the steps that start before `position`, the newest is that step: what was sent after it on a
        guess starts at `position` or later.
        """
        for seq, step in reversed(self.waiting):
            if step.start < position and step.kind is not StepKind.REFILL:
                self._begun(seq + 1)
                break

    def clear(self) -> None:
        """Forget all steps, because the stage has ended."""
        self.waiting.clear()

    def _begun(self, seq: int) -> None:
        while self.waiting and self.waiting[0][0] < seq:
            self.waiting.popleft()
