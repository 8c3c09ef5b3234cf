"""The state of one session at one stage, as a pure state machine: events in, commands out.

The machine orders the steps, answers repeated steps, waits for credit and for the next stage, sends kept outputs before it
computes, and decides when the stage's KV may be released. The machine never sees a tensor: inputs and outputs of steps are opaque.

    OPEN --StageResumed--> IDLE, WAITING or COMPUTING             (a later epoch only; the first epoch starts in IDLE)
    IDLE --StepArrived--> COMPUTING --StepComputed--> IDLE        (or COMPUTING the next step of the inbox)
    IDLE --StepArrived beyond credit or window--> WAITING --CreditGranted, StepTaken--> COMPUTING
    any --StageEnded--> ENDED                                     (the KV is released when no step computes on it)
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from meshd.agents.machine import IllegalTransition, Machine, Transition

PREFILL_WINDOW = 4
"""Prefill steps that may be sent before the next stage has begun the first of them (SPEC.md, section 8)."""


class StageState(Enum):
    """What the stage is doing for its session."""

    OPEN = "open"
    """Waits for RESUME, which contains the position to start at."""
    IDLE = "idle"
    WAITING = "waiting"
    """Has steps or kept outputs to send, but needs credit or space in the prefill window."""
    COMPUTING = "computing"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: tokens `[position, position + tokens)`. Its position identifies it."""

    position: int
    tokens: int
    sample: bool
    """Whether the last stage samples a token after this step."""
    prefill: bool
    """Whether the tokens were known when the epoch began; otherwise this is a decode step."""
    index: int = 0
    """For a decode step: index in the answer of the token that is sampled after this step."""
    data: object = None
    """Token ids or hidden states."""

    @property
    def end(self) -> int:
        return self.position + self.tokens


@dataclass(frozen=True, slots=True)
class StageResumed:
    """All stages of the epoch are open. Compute from `start` on; the next stage needs the outputs from `send_from` on."""

    start: int
    send_from: int


@dataclass(frozen=True, slots=True)
class StepArrived:
    step: Step


@dataclass(frozen=True, slots=True)
class StepComputed:
    position: int
    output: object


@dataclass(frozen=True, slots=True)
class StepTaken:
    """The next stage began this prefill step."""

    position: int


@dataclass(frozen=True, slots=True)
class CreditGranted:
    index: int
    hold: bool = False
    """Whether the credit becomes `index` even if more was granted before."""


@dataclass(frozen=True, slots=True)
class StageEnded:
    """The coordinator closed the stage or opened a later epoch, the stage failed, or its lease ran out."""

    reason: str


Event = StageResumed | StepArrived | StepComputed | StepTaken | CreditGranted | StageEnded


@dataclass(frozen=True, slots=True)
class BeginAt:
    """Drop KV and kept outputs from position `start` on: they are computed again."""

    start: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Send the kept outputs of `[position, position + tokens)` to the next stage."""

    position: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Compute:
    step: Step


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send a step's output: its activation without the first `skip` tokens, or the token that the step sampled."""

    step: Step
    output: object
    skip: int = 0


@dataclass(frozen=True, slots=True)
class RejectStep:
    """Report to the coordinator that the stage can't take this step."""

    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class RefuseResume:
    """Report to the coordinator that the stage can't start as RESUME requests."""

    reason: str


@dataclass(frozen=True, slots=True)
class FreeKv:
    """Release the stage's KV: no step computes on it any more."""

    reason: str


Command = BeginAt | Replay | Compute | Deliver | RejectStep | RefuseResume | FreeKv


@dataclass(slots=True)
class StageSession(Machine[Event, Command]):
    """State of one session on one stage. Only `handle` changes it."""

    known_tokens: int
    """Length of the prompt and the answer together when the epoch began, in tokens."""
    max_tokens: int
    """Tokens of prompt and answer for which KV is reserved."""
    credit: int
    """Number of answer tokens that may be generated."""
    first: bool
    """Whether this is stage 0, whose decode steps come from TOKEN and are limited by CREDIT."""
    last: bool
    """Whether this is the last stage, which samples and has no next stage to wait for."""
    state: StageState = StageState.IDLE
    held: int = 0
    """KV of positions `[0, held)` was valid when the stage opened."""
    kept_from: int = 0
    """Outputs of `[kept_from, kept_to)` were kept when the stage opened."""
    kept_to: int = 0
    chunk_tokens: int = 1
    """Maximum number of tokens in one replayed step."""
    next_position: int = 0
    """Position of the next step that may arrive."""
    send_from: int = 0
    """Position from which outputs are sent: the next stage had all earlier ones when this stage resumed."""
    sent_to: int = 0
    """Outputs of all positions before this one have been sent to the next stage."""
    replay_to: int = 0
    """Kept outputs are sent up to this position."""
    inbox: deque[Step] = field(default_factory=deque)
    """Steps that wait to be computed, in order."""
    computing: Step | None = None
    untaken: set[int] = field(default_factory=set)
    """Positions of sent prefill steps that the next stage has not begun."""
    done: Step | None = None
    """The newest computed step. A repeat of this step is answered with `done_output`."""
    done_output: object = None
    reason: str = ""

    def validate(self) -> None:
        """Check the invariants between events. Tests call it after each event. Raises: AssertionError."""
        if self.state is StageState.COMPUTING and self.computing is None:
            raise AssertionError("the state is COMPUTING, but there is no step")
        if self.state in (StageState.OPEN, StageState.IDLE, StageState.WAITING) and self.computing is not None:
            raise AssertionError(f"a step computes in state {self.state.name}")
        if self.state in (StageState.IDLE, StageState.WAITING) and (self.state is StageState.WAITING) != bool(
            self.inbox or self.replaying
        ):
            raise AssertionError("steps wait in state IDLE, or none waits in state WAITING")
        if self.state is StageState.COMPUTING and self.replaying:
            raise AssertionError("a step computes before the kept outputs are sent")
        if len(self.inbox) > (self.early_limit if self.state is StageState.OPEN else self.known_tokens + 1):
            raise AssertionError("the inbox exceeds its bound")
        if self.next_position > self.max_tokens:
            raise AssertionError("the steps exceed the reserved KV")

    @property
    def replaying(self) -> bool:
        """Whether kept outputs wait to be sent."""
        return self.sent_to < self.replay_to

    @property
    def early_limit(self) -> int:
        """Number of steps that may arrive before RESUME.

        The first stage's steps come from the coordinator, which sends all of them with RESUME but on another lane.
        """
        return self.known_tokens if self.first else PREFILL_WINDOW

    def _admit(self, step: Step) -> str:
        """Check a new step. Returns: why it can't be next; empty if it can."""
        if step.position != self.next_position:
            return f"step {step.position} came where {self.next_position} was due"
        if step.tokens < 1 or step.end > self.max_tokens:
            return f"{step.tokens} tokens at {step.position} are past the {self.max_tokens} reserved"
        if step.prefill and step.end > self.known_tokens:
            return f"{step.tokens} tokens at {step.position} are past the {self.known_tokens} known"
        if step.sample and step.end < self.known_tokens:
            return f"sampling is requested at {step.end}, where the token is already known"
        return ""

    def _runnable(self, step: Step) -> bool:
        """Whether the step may start: a prefill needs space in the prefill window, a decode step needs credit."""
        if step.prefill:
            return self.last or len(self.untaken) < PREFILL_WINDOW
        return not self.first or step.index < self.credit

    def _next(self) -> list[Command]:
        """Send kept outputs, then start the next step of the inbox, as far as the prefill window and the credit allow."""
        commands = self._replay() if self.replaying else []
        if not (self.inbox or self.replaying):
            self.state = StageState.IDLE
        elif self.replaying or not self._runnable(self.inbox[0]):
            self.state = StageState.WAITING
        else:
            self.computing = self.inbox.popleft()
            self.state = StageState.COMPUTING
            commands.append(Compute(self.computing))
        return commands

    def _replay(self) -> list[Command]:
        commands: list[Command] = []
        while self.replaying and len(self.untaken) < PREFILL_WINDOW:
            tokens = min(self.chunk_tokens, self.replay_to - self.sent_to)
            commands.append(Replay(self.sent_to, tokens))
            self.untaken.add(self.sent_to)
            self.sent_to += tokens
        return commands

    def _can_resume(self, event: StageResumed) -> str:
        """Check RESUME. Returns: why the stage can't start as requested; empty if it can."""
        if not 0 <= event.start <= self.held:
            return f"it has KV of {self.held} tokens: it can't start at {event.start}"
        if event.start >= self.known_tokens or not 0 <= event.send_from < self.known_tokens:
            return f"{self.known_tokens} tokens are known: it can't start at {event.start} and send from {event.send_from}"
        available = self.kept_from <= event.send_from and event.start <= self.kept_to
        if not self.last and not available and event.send_from < event.start:
            return f"outputs {self.kept_from} to {self.kept_to} are kept, not those from {event.send_from} to {event.start}"
        return ""

    def _deliver(self, step: Step, output: object) -> list[Command]:
        """Deliver a computed step, without the positions that the next stage already has."""
        skip = 0 if self.last else max(0, min(step.tokens, self.send_from - step.position))
        return [Deliver(step, output, skip)] if skip < step.tokens else []


def _resumed(session: StageSession, event: StageResumed) -> list[Command]:
    reason = session._can_resume(event)
    if reason:
        return [RefuseResume(reason)]
    session.next_position = event.start
    session.send_from = session.sent_to = event.send_from
    session.replay_to = 0 if session.last else event.start
    early, session.inbox = session.inbox, deque()
    commands: list[Command] = [BeginAt(event.start), *session._next()]
    for step in early:
        commands += _step_arrived(session, StepArrived(step))
    return commands


def _step_early(session: StageSession, event: StepArrived) -> list[Command]:
    """Queue a step that arrived before RESUME.

    The previous stage may resume before this one, and may then send a full prefill window.
    """
    if len(session.inbox) >= session.early_limit:
        return [RejectStep(event.step, f"more than {session.early_limit} steps came before RESUME")]
    session.inbox.append(event.step)
    return []


def _step_arrived(session: StageSession, event: StepArrived) -> list[Command]:
    step = event.step
    if step.position < session.next_position:
        if session.done is not None and step.position == session.done.position:
            return session._deliver(session.done, session.done_output)
        return []  # repeats an older step, whose output was sent, or the running step, whose output will be sent
    reason = session._admit(step)
    if reason:
        return [RejectStep(step, reason)]
    session.next_position = step.end
    session.inbox.append(step)
    return session._next() if session.state is StageState.IDLE else []


def _step_computed(session: StageSession, event: StepComputed) -> list[Command]:
    step = session.computing
    if step is None or step.position != event.position:
        raise IllegalTransition(f"step {event.position} was reported as computed, but {step and step.position} is computing")
    session.computing = None
    session.done, session.done_output = step, event.output
    commands = session._deliver(step, event.output)
    if commands:
        session.sent_to = step.end
        if step.prefill and not session.last:
            session.untaken.add(max(step.position, session.send_from))
    return [*commands, *session._next()]


def _step_taken(session: StageSession, event: StepTaken) -> list[Command]:
    session.untaken = {position for position in session.untaken if position > event.position}
    return session._next() if session.state is StageState.WAITING else []


def _credit_granted(session: StageSession, event: CreditGranted) -> list[Command]:
    session.credit = event.index if event.hold else max(session.credit, event.index)
    return session._next() if session.state is StageState.WAITING else []


def _ended(session: StageSession, event: StageEnded) -> list[Command]:
    session.state, session.reason = StageState.ENDED, event.reason
    session.inbox.clear()
    session.done_output = None
    session.replay_to = 0
    return [] if session.computing is not None else [FreeKv(event.reason)]


def _computed_after_end(session: StageSession, event: StepComputed) -> list[Command]:
    session.computing = None
    return [FreeKv(session.reason)]


def _ignore(session: StageSession, event: Event) -> list[Command]:
    return []


_ignored = Transition(_ignore)
_ends = Transition(_ended, (StageState.ENDED,))

TRANSITIONS: dict[tuple[Enum, type[Any]], Transition] = {
    (StageState.OPEN, StageResumed): Transition(_resumed, (StageState.IDLE, StageState.WAITING, StageState.COMPUTING)),
    (StageState.OPEN, StepArrived): Transition(_step_early),
    (StageState.OPEN, StepTaken): _ignored,
    (StageState.OPEN, CreditGranted): Transition(_credit_granted),
    (StageState.OPEN, StageEnded): _ends,
    (StageState.ENDED, StepComputed): Transition(_computed_after_end),
    (StageState.COMPUTING, StepComputed): Transition(_step_computed, (StageState.IDLE, StageState.WAITING)),
}
for _state in (StageState.IDLE, StageState.WAITING, StageState.COMPUTING):
    _starts = (StageState.WAITING, StageState.COMPUTING) if _state is StageState.IDLE else ()
    _continues = (StageState.IDLE, StageState.COMPUTING) if _state is StageState.WAITING else ()
    TRANSITIONS[_state, StepArrived] = Transition(_step_arrived, _starts)
    TRANSITIONS[_state, StepTaken] = Transition(_step_taken, _continues)
    TRANSITIONS[_state, CreditGranted] = Transition(_credit_granted, _continues)
    TRANSITIONS[_state, StageEnded] = _ends
    TRANSITIONS[_state, StageResumed] = _ignored  # a repeated RESUME
for _event in (StageResumed, StepArrived, StepTaken, CreditGranted, StageEnded):
    TRANSITIONS[StageState.ENDED, _event] = _ignored
StageSession.table = TRANSITIONS
