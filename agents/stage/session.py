"""One session's part on the peer that runs one of its stages, as a pure state machine: events in, commands out.

It decides which step is next, what a repeat means, when to wait for credit or for the next stage, which kept outputs are
sent before anything is computed, and when KV may be freed. It never sees a tensor: inputs and outputs of a step are opaque to it.

    OPEN --StageResumed--> IDLE, WAITING or COMPUTING                      (only in a later epoch; a first one begins in IDLE)
    IDLE --StepArrived--> COMPUTING --StepComputed--> IDLE            (or the next step of the inbox)
    IDLE --StepArrived beyond credit or window--> WAITING --CreditGranted, StepTaken--> COMPUTING
    any --StageEnded--> ENDED; the KV is freed when no step computes on it
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from meshd.agents.machine import IllegalTransition, Machine, Transition

PREFILL_WINDOW = 4
"""Prefill steps that may be sent on and not yet begun by the next stage."""


class StageState(Enum):
    """Where a session stands on this stage."""

    OPEN = "open"
    """Waits for RESUME, which names the position to start at."""
    IDLE = "idle"
    WAITING = "waiting"
    COMPUTING = "computing"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: tokens `[position, position + tokens)`. Its position names it."""

    position: int
    tokens: int
    sample: bool
    """The last stage picks a token after it."""
    prefill: bool
    """Its tokens were known when the epoch began."""
    index: int = 0
    """Decode: the answer token that this step will make."""
    data: object = None
    """Token ids or hidden states."""

    @property
    def end(self) -> int:
        return self.position + self.tokens


@dataclass(frozen=True, slots=True)
class StageResumed:
    """Every stage of the epoch is open: compute from `start` on; the next stage wants outputs from `send_from` on."""

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
    """Lower the credit to `index` if more was granted before."""


@dataclass(frozen=True, slots=True)
class StageEnded:
    """Closed by the coordinator, failed, or its lease ran out."""

    reason: str


Event = StageResumed | StepArrived | StepComputed | StepTaken | CreditGranted | StageEnded


@dataclass(frozen=True, slots=True)
class BeginAt:
    """KV is valid up to `start`; positions from there on are computed anew."""

    start: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Send kept outputs of tokens `[position, position + tokens)` to the next stage."""

    position: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Compute:
    step: Step


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send a step's output: an activation to the next stage, without its first `skip` tokens, or a token."""

    step: Step
    output: object
    skip: int = 0


@dataclass(frozen=True, slots=True)
class RejectStep:
    """Report to the coordinator that the step is not valid here."""

    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class RefuseResume:
    """Report to the coordinator that the stage can't start there."""

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
    """The prompt, and the answer tokens that were known when the epoch began."""
    max_tokens: int
    """Tokens of prompt and answer together, for which KV is reserved."""
    credit: int
    first: bool
    """This is stage 0, which takes its decode steps from TOKEN and obeys CREDIT."""
    last: bool
    state: StageState = StageState.IDLE
    held: int = 0
    """Positions whose KV this peer had when the stage opened."""
    kept_from: int = 0
    """Outputs of `[kept_from, kept_to)` were kept when the stage opened."""
    kept_to: int = 0
    chunk_tokens: int = 1
    """Tokens of one replayed step."""
    next_position: int = 0
    send_from: int = 0
    """The next stage has the outputs of all positions before this one."""
    sent_to: int = 0
    """Outputs of all positions before this one have been sent to the next stage."""
    replay_to: int = 0
    inbox: deque[Step] = field(default_factory=deque)
    computing: Step | None = None
    untaken: set[int] = field(default_factory=set)
    done: Step | None = None
    """The newest finished step: a repeat is answered from `done_output`."""
    done_output: object = None
    reason: str = ""

    def validate(self) -> None:
        """Invariants that hold between events; tests call it after each."""
        if self.state is StageState.COMPUTING and self.computing is None:
            raise AssertionError("computing, but no step")
        if self.state in (StageState.OPEN, StageState.IDLE, StageState.WAITING) and self.computing is not None:
            raise AssertionError("a step computes in a state that has none")
        if self.state in (StageState.IDLE, StageState.WAITING) and (self.state is StageState.WAITING) != bool(
            self.inbox or self.replaying
        ):
            raise AssertionError("steps wait while idle, or none do while waiting")
        if self.state is StageState.COMPUTING and self.replaying:
            raise AssertionError("computes before the kept outputs are sent")
        if len(self.inbox) > (PREFILL_WINDOW if self.state is StageState.OPEN else self.known_tokens + 1):
            raise AssertionError("the inbox is past its bound")
        if self.next_position > self.max_tokens:
            raise AssertionError("steps past the reservation")

    @property
    def replaying(self) -> bool:
        """Kept outputs wait to be sent."""
        return self.sent_to < self.replay_to

    def _admit(self, step: Step) -> str:
        """Why this step can't be next; empty if it can."""
        if step.position != self.next_position:
            return f"step {step.position} came where {self.next_position} was due"
        if step.tokens < 1 or step.end > self.max_tokens:
            return f"{step.tokens} tokens at {step.position} are past the {self.max_tokens} reserved"
        if step.prefill and step.end > self.known_tokens:
            return f"{step.tokens} tokens at {step.position} are past the {self.known_tokens} known"
        if step.sample and step.end < self.known_tokens:
            return f"a token is asked for at {step.end}, where it is known"
        return ""

    def _runnable(self, step: Step) -> bool:
        if step.prefill:
            return self.last or len(self.untaken) < PREFILL_WINDOW
        return not self.first or step.index < self.credit

    def _next(self) -> list[Command]:
        """Send the kept outputs, then start the next step of the inbox, as far as window and credit allow."""
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
        """Why the stage can't start there; empty if it can."""
        if not 0 <= event.start <= self.held:
            return f"it has KV of {self.held} tokens: it can't start at {event.start}"
        if event.start >= self.known_tokens or not 0 <= event.send_from < self.known_tokens:
            return f"{self.known_tokens} tokens are known: it can't start at {event.start} and send from {event.send_from}"
        kept = self.kept_from <= event.send_from and event.start <= self.kept_to
        if not self.last and not kept and event.send_from < event.start:
            return f"outputs {self.kept_from} to {self.kept_to} are kept, not those from {event.send_from} to {event.start}"
        return ""

    def _deliver(self, step: Step, output: object) -> list[Command]:
        """Deliver a computed step, without the positions that the next stage has."""
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
    """The stage before resumed first: keep as many steps as it may send before one is taken."""
    if len(session.inbox) >= PREFILL_WINDOW:
        return [RejectStep(event.step, f"more than {PREFILL_WINDOW} steps came before RESUME")]
    session.inbox.append(event.step)
    return []


def _step_arrived(session: StageSession, event: StepArrived) -> list[Command]:
    step = event.step
    if step.position < session.next_position:
        if session.done is not None and step.position == session.done.position:
            return session._deliver(session.done, session.done_output)
        return []  # a repeat of an older step, or of one that computes: its answer was or will be sent
    reason = session._admit(step)
    if reason:
        return [RejectStep(step, reason)]
    session.next_position = step.end
    session.inbox.append(step)
    return session._next() if session.state is StageState.IDLE else []


def _step_computed(session: StageSession, event: StepComputed) -> list[Command]:
    step = session.computing
    if step is None or step.position != event.position:
        raise IllegalTransition(f"step {event.position} was computed where {step and step.position} was under way")
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
    _goes_on = (StageState.IDLE, StageState.COMPUTING) if _state is StageState.WAITING else ()
    TRANSITIONS[_state, StepArrived] = Transition(_step_arrived, _starts)
    TRANSITIONS[_state, StepTaken] = Transition(_step_taken, _goes_on)
    TRANSITIONS[_state, CreditGranted] = Transition(_credit_granted, _goes_on)
    TRANSITIONS[_state, StageEnded] = _ends
    TRANSITIONS[_state, StageResumed] = _ignored  # a repeat
for _event in (StageResumed, StepArrived, StepTaken, CreditGranted, StageEnded):
    TRANSITIONS[StageState.ENDED, _event] = _ignored
StageSession.table = TRANSITIONS
