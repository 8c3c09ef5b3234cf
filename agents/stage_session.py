"""One session's part on the peer that runs one of its stages, as a pure state machine: events in, commands out.

It decides which step is next, what a repeat means, when to wait for credit or for the next stage, and when memory may go. It never
sees a tensor: what a step carries and what it made are opaque to it.

    IDLE --StepArrived--> COMPUTING --StepComputed--> IDLE            (or the next step of the inbox)
    IDLE --StepArrived beyond credit or window--> WAITING --CreditGranted, StepTaken--> COMPUTING
    any --Ended--> ENDED; the KV is freed when no step is computing on it
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

PREFILL_WINDOW = 4
"""Prefill steps that may be computed here and not yet begun by the next stage."""


class State(Enum):
    """Where a session stands on this stage."""

    IDLE = "idle"
    WAITING = "waiting"
    COMPUTING = "computing"
    ENDED = "ended"


class IllegalTransition(RuntimeError):
    """A bug of ours: this event can't come in this state."""


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: tokens `[position, position + tokens)`."""

    number: int
    position: int
    tokens: int
    sample: bool
    """The last stage picks a token after it."""
    prefill: bool
    index: int = 0
    """Decode: the answer token that this step will make."""
    data: object = None
    """Token ids or hidden states."""


# Events


@dataclass(frozen=True, slots=True)
class StepArrived:
    step: Step


@dataclass(frozen=True, slots=True)
class StepComputed:
    number: int
    output: object


@dataclass(frozen=True, slots=True)
class StepTaken:
    """The next stage began this prefill step."""

    number: int


@dataclass(frozen=True, slots=True)
class CreditGranted:
    index: int


@dataclass(frozen=True, slots=True)
class Ended:
    """Closed by the coordinator, or its lease ran out."""

    reason: str


Event = StepArrived | StepComputed | StepTaken | CreditGranted | Ended

# Commands


@dataclass(frozen=True, slots=True)
class Compute:
    step: Step


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send what a step made: an activation to the next stage, or a token."""

    step: Step
    output: object


@dataclass(frozen=True, slots=True)
class Reject:
    """The step can't be: the coordinator is told."""

    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class Free:
    """Nothing computes on the session's KV any more."""

    reason: str


Command = Compute | Deliver | Reject | Free


@dataclass(slots=True)
class StageSession:
    """State of one session on one stage. Only `handle` changes it."""

    prompt_tokens: int
    max_tokens: int
    credit: int
    first: bool
    """This is stage 0, which takes its decode steps from TOKEN and obeys CREDIT."""
    last: bool
    state: State = State.IDLE
    next_number: int = 0
    next_position: int = 0
    inbox: deque[Step] = field(default_factory=deque)
    computing: Step | None = None
    untaken: set[int] = field(default_factory=set)
    done: Step | None = None
    """The newest finished step and what it made: a repeat is answered from here."""
    done_output: object = None
    reason: str = ""

    def handle(self, event: Event) -> list[Command]:
        """Apply one event. Raises: IllegalTransition, with nothing changed."""
        transition = TRANSITIONS.get((self.state, type(event)))
        if transition is None:
            raise IllegalTransition(f"{type(event).__name__} in state {self.state.value}")
        return transition(self, event)

    def validate(self) -> None:
        """Invariants that hold between events; tests call it after each."""
        if self.state is State.COMPUTING and self.computing is None:
            raise AssertionError("computing, but no step")
        if self.state in (State.IDLE, State.WAITING) and self.computing is not None:
            raise AssertionError("a step computes unnoticed")
        if (self.state is State.WAITING) != bool(self.inbox) and self.state in (State.IDLE, State.WAITING):
            raise AssertionError("steps wait unnoticed, or none do")
        if len(self.inbox) > self.prompt_tokens + 1:
            raise AssertionError("the inbox is past its bound")
        if self.next_position > self.prompt_tokens + self.max_tokens:
            raise AssertionError("steps past the reservation")

    def _admit(self, step: Step) -> str:
        """Why this step can't be next; empty if it can."""
        if step.number != self.next_number:
            return f"step {step.number} came where {self.next_number} was due"
        if step.position != self.next_position:
            return f"position {step.position} came where {self.next_position} was due"
        if step.tokens < 1 or step.position + step.tokens > self.prompt_tokens + self.max_tokens:
            return f"{step.tokens} tokens at {step.position} are past the {self.prompt_tokens + self.max_tokens} reserved"
        return ""

    def _runnable(self, step: Step) -> bool:
        if step.prefill:
            return self.last or len(self.untaken) < PREFILL_WINDOW
        return not self.first or step.index < self.credit

    def _next(self) -> list[Command]:
        """Start what the inbox holds, if it may start."""
        if not self.inbox:
            self.state = State.IDLE
            return []
        if not self._runnable(self.inbox[0]):
            self.state = State.WAITING
            return []
        self.computing = self.inbox.popleft()
        self.state = State.COMPUTING
        return [Compute(self.computing)]


def _step_arrived(session: StageSession, event: StepArrived) -> list[Command]:
    step = event.step
    if step.number < session.next_number:
        if session.done is not None and step.number == session.done.number:
            return [Deliver(session.done, session.done_output)]
        return []  # an old repeat, or one that is under way: its answer went or will go out
    reason = session._admit(step)
    if reason:
        return [Reject(step, reason)]
    session.next_number = step.number + 1
    session.next_position = step.position + step.tokens
    session.inbox.append(step)
    return session._next() if session.state is State.IDLE else []


def _step_computed(session: StageSession, event: StepComputed) -> list[Command]:
    step = session.computing
    if step is None or step.number != event.number:
        raise IllegalTransition(f"step {event.number} was computed where {step and step.number} was under way")
    session.computing = None
    session.done, session.done_output = step, event.output
    if step.prefill and not session.last:
        session.untaken.add(step.number)
    return [Deliver(step, event.output), *session._next()]


def _step_taken(session: StageSession, event: StepTaken) -> list[Command]:
    session.untaken = {number for number in session.untaken if number > event.number}
    return session._next() if session.state is State.WAITING else []


def _credit_granted(session: StageSession, event: CreditGranted) -> list[Command]:
    session.credit = max(session.credit, event.index)
    return session._next() if session.state is State.WAITING else []


def _ended(session: StageSession, event: Ended) -> list[Command]:
    session.state, session.reason = State.ENDED, event.reason
    session.inbox.clear()
    session.done_output = None
    return [] if session.computing is not None else [Free(event.reason)]


def _computed_after_end(session: StageSession, event: StepComputed) -> list[Command]:
    session.computing = None
    return [Free(session.reason)]


def _ignore(session: StageSession, event: Event) -> list[Command]:
    return []


TRANSITIONS: dict[tuple[State, type[Any]], Callable[[StageSession, Any], list[Command]]] = {
    (State.IDLE, StepArrived): _step_arrived,
    (State.IDLE, StepTaken): _step_taken,
    (State.IDLE, CreditGranted): _credit_granted,
    (State.IDLE, Ended): _ended,
    (State.WAITING, StepArrived): _step_arrived,
    (State.WAITING, StepTaken): _step_taken,
    (State.WAITING, CreditGranted): _credit_granted,
    (State.WAITING, Ended): _ended,
    (State.COMPUTING, StepArrived): _step_arrived,
    (State.COMPUTING, StepComputed): _step_computed,
    (State.COMPUTING, StepTaken): _step_taken,
    (State.COMPUTING, CreditGranted): _credit_granted,
    (State.COMPUTING, Ended): _ended,
    (State.ENDED, StepComputed): _computed_after_end,
    (State.ENDED, StepArrived): _ignore,
    (State.ENDED, StepTaken): _ignore,
    (State.ENDED, CreditGranted): _ignore,
    (State.ENDED, Ended): _ignore,
}
