"""The state of one session at one stage, as a pure state machine: events in, commands out.

The machine orders the steps, drops repeats and void guesses, waits for credit, sends kept outputs before it computes, and decides
when the stage's KV may be released. The scheduler decides when a ready step begins, and how much of a prompt. The machine never
sees a tensor: inputs and outputs of steps are opaque.

    OPEN --StageResumed--> IDLE, WAITING or READY                 (a later epoch only; the first epoch starts in IDLE)
    IDLE --StepArrived--> READY --StepBegun--> COMPUTING --StepComputed--> IDLE, WAITING or READY
    IDLE --StepArrived without credit for its output--> WAITING --OutputAcknowledged--> READY
    any --StageEnded--> ENDED                                     (the KV is released when no step computes on it)

Positions of a session at a stage: committed <= due and computed <= due.  A step that starts before `due` takes back what was
computed from its start on. It never starts before `committed`.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from meshd.agents.machine import IllegalTransition, Machine, Transition
from meshd.agents.stage.flow.edges import InputEdge, OutputEdge
from meshd.agents.stage.flow.events import (
    Acknowledge,
    BeginAt,
    Command,
    Deliver,
    DeliverTokens,
    Event,
    FreeKv,
    OutputAcknowledged,
    RefuseResume,
    RejectStep,
    SampledTokens,
    StageEnded,
    StageResumed,
    StageStep,
    StepArrived,
    StepBegun,
    StepComputed,
    TokensArrived,
    TokensGranted,
    TokensGuessed,
    Truncate,
)
from meshd.agents.stage.flow.rules import resume_refusal, step_refusal
from meshd.bounds import MAX_VERIFIED
from meshd.protocol.messages import STEP_WINDOW, StepKind


class StageState(Enum):
    """What the stage is doing for its session."""

    OPEN = "open"
    """Waits for RESUME, which contains the position to start at."""
    IDLE = "idle"
    WAITING = "waiting"
    """Has steps or kept outputs to send, but no credit to send them."""
    READY = "ready"
    """The first step of the inbox may begin."""
    COMPUTING = "computing"
    ENDED = "ended"


@dataclass(slots=True)
class StageSession(Machine[Event, Command]):
    """State of one session on one stage. Only `handle` changes it."""

    prompt_tokens: int
    known_tokens: int
    """Length of the prompt and the answer together when the epoch began, in tokens."""
    max_tokens: int
    """Tokens of prompt and answer for which KV is reserved."""
    token_credit: int
    """At the first and the last stage: answer tokens before this index may be made."""
    first: bool
    """Whether this is stage 0, which makes its decode steps of the tokens that the last stage samples."""
    last: bool
    """Whether this is the last stage, which samples and has no next stage."""
    state: StageState = StageState.IDLE
    held: int = 0
    """KV of positions `[0, held)` was valid when the stage opened."""
    held_from: int = 0
    """First position above 0 at which the stage can start: layers with a window keep no KV far behind it."""
    kept_from: int = 0
    """Outputs of `[kept_from, kept_to)` were kept when the stage opened."""
    kept_to: int = 0
    chunk_tokens: int = 1
    """Maximum number of tokens in one replayed step."""
    due: int = 0
    """Position after the newest step in order."""
    computed: int = 0
    """Position after the newest step that has begun."""
    committed: int = 0
    """No step in order may start before this position."""
    known_to: int = field(init=False)
    """At the first stage: the final tokens of all positions before this one have arrived."""
    sampled_to: int = field(init=False)
    """At the last stage: the final tokens of all positions before this one are known or sampled."""
    newest_token: int | None = None
    """At the last stage: the token at position `sampled_to - 1`. None: it was sampled in an earlier epoch."""
    complete: bool = False
    """At the last stage: the answer's last token was sampled."""
    send_from: int = 0
    """Position from which outputs are sent: the next stage had all earlier ones when this stage resumed."""
    sent_to: int = 0
    """Outputs of all positions before this one have been sent to the next stage."""
    replay_to: int = 0
    """Kept outputs are sent up to this position."""
    input: InputEdge = field(default_factory=InputEdge)
    output: OutputEdge = field(default_factory=OutputEdge)
    guesses: deque[StageStep] = field(default_factory=deque)
    """At the first stage: verify steps whose tokens have not come back."""
    inbox: deque[StageStep] = field(default_factory=deque)
    """Steps in order that have not begun."""
    computing: StageStep | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        self.known_to = self.sampled_to = self.known_tokens

    def validate(self) -> None:
        """Check the invariants between events. Tests call it after each event. Raises: AssertionError."""
        if (self.state is StageState.COMPUTING) != (self.computing is not None) and self.state is not StageState.ENDED:
            raise AssertionError("a step computes, but the state is not COMPUTING, or the reverse")
        if self.state is StageState.IDLE and (self.inbox or self.replaying):
            raise AssertionError("steps wait in state IDLE")
        if self.state in (StageState.READY, StageState.COMPUTING) and self.replaying:
            raise AssertionError("a step begins before the kept outputs are sent")
        if self.state is StageState.READY and not (self.inbox and self._has_credit(self.inbox[0])):
            raise AssertionError("no step can begin in state READY")
        if len(self.input.early) > STEP_WINDOW or len(self.inbox) > STEP_WINDOW + 1 or len(self.guesses) > STEP_WINDOW:
            raise AssertionError("more steps wait than the window allows")
        if self.output.next_seq > self.output.credit or len(self.output.waiting) > STEP_WINDOW:
            raise AssertionError("more steps were sent than the next stage has room for")
        if not self.committed <= self.due <= self.max_tokens:
            raise AssertionError("the steps exceed the reserved KV, or take committed positions back")

    @property
    def replaying(self) -> bool:
        """Whether kept outputs wait to be sent."""
        return self.sent_to < self.replay_to

    @property
    def ready(self) -> StageStep | None:
        """The step that may begin now."""
        return self.inbox[0] if self.state is StageState.READY else None

    def _has_credit(self, step: StageStep) -> bool:
        """Whether there is room for what the step puts out."""
        if step.kind is StepKind.REFILL:
            return True
        if (self.last or (self.first and step.ids)) and step.sample and self._token_room(step) <= 0:
            return False
        return self.last or self.output.open or step.end <= self.send_from

    def _token_room(self, step: StageStep) -> int:
        """How many of the tokens that are sampled after a step the coordinator has room for."""
        return self.token_credit - (step.sampled_from - self.prompt_tokens)

    def _within_credit(self, step: StageStep) -> StageStep:
        """Cut off guesses that the coordinator has no room for. A slow client may never make room for the whole step."""
        room = self._token_room(step)
        if not self.last or step.kind is not StepKind.VERIFY or room >= step.sample:
            return step
        return replace(step, tokens=room, sample=room, ids=step.ids[:room])

    def _next(self) -> list[Command]:
        """Send kept outputs and drop void steps, then find out whether the next step of the inbox may begin."""
        commands = self._replay() if self.replaying else []
        while self.inbox and self._is_void(self.inbox[0]):
            self.inbox.popleft()
            if not self.first:  # which makes its guesses itself
                commands.append(self._free_room())
        if not (self.inbox or self.replaying):
            self.state = StageState.IDLE
        else:
            ready = not self.replaying and self._has_credit(self.inbox[0])
            self.state = StageState.READY if ready else StageState.WAITING
        return commands

    def _replay(self) -> list[Command]:
        commands: list[Command] = []
        while self.replaying and self.output.open:
            tokens = min(self.chunk_tokens, self.replay_to - self.sent_to)
            step = StageStep(self.sent_to, tokens, StepKind.PREFILL, committed=self.sent_to + tokens)
            commands.append(Deliver(self.output.add(step, None)))
            self.sent_to += tokens
        return commands

    def _is_void(self, step: StageStep) -> bool:
        """Whether the last stage has sampled another token than the one that this verify step begins with, or the answer's end."""
        if not self.last or step.kind is not StepKind.VERIFY:
            return False
        return self.complete or step.start != self.sampled_to - 1 or self.newest_token not in (None, step.ids[0])

    def _free_room(self) -> Acknowledge:
        self.input.begun += 1
        return Acknowledge(self.input.next_seq, self.input.credit)

    def _take_in_order(self) -> list[Command]:
        while (step := self.input.take()) is not None:
            reason = step_refusal(self, step)
            if reason:
                return [RejectStep(step, reason)]
            self._accept(step)
        return self._next() if self.state in (StageState.IDLE, StageState.WAITING) else []

    def _accept(self, step: StageStep) -> None:
        """Put a step into the inbox. It takes back the positions from its start on."""
        if step.kind is not StepKind.REFILL:
            self.due, self.committed = step.end, max(self.committed, step.committed)
        if step.kind is StepKind.DECODE and not self.first:
            self.output.sampled_at(step.start)
        before = len(self.inbox)
        if step.kind is StepKind.REFILL and self.first:
            # The stage's own steps attend to what the refill mends, and may wait for credit.
            before = next((at for at, own in enumerate(self.inbox) if own.ids and own.start >= step.end), before)
        self.inbox.insert(before, step)

    def _deliver(self, step: StageStep, event: StepComputed) -> list[Command]:
        """Send a computed step's output, without the positions that the next stage already has."""
        if step.kind is StepKind.REFILL:
            return []
        self.sent_to = step.end
        if self.last:
            if not event.tokens:
                return []
            sampled = SampledTokens(self.sampled_to - self.prompt_tokens, event.tokens, event.output)
            self.sampled_to += len(event.tokens)
            self.newest_token, self.complete = event.tokens[-1], event.ends
            return [DeliverTokens(sampled)]
        skip = max(0, min(step.tokens, self.send_from - step.start))
        return [Deliver(self.output.add(step, event.output, skip))] if skip < step.tokens else []


def _resumed(session: StageSession, event: StageResumed) -> list[Command]:
    reason = resume_refusal(session, event)
    if reason:
        return [RefuseResume(reason)]
    session.due = session.computed = session.committed = event.start
    session.send_from = session.sent_to = event.send_from
    session.replay_to = 0 if session.last else event.start
    commands: list[Command] = [BeginAt(event.start), *session._next()]
    # Not before this: the previous stage may resume first, and its steps then wait in the input edge.
    return commands + session._take_in_order()


def _step_arrived(session: StageSession, event: StepArrived) -> list[Command]:
    step = event.step
    if session.input.is_repeat(step):
        return [Acknowledge(session.input.next_seq, session.input.credit)]
    if not session.input.put(step):
        return [RejectStep(step, f"step {step.seq} came without credit: {session.input.credit} were allowed")]
    return session._take_in_order() if session.state is not StageState.OPEN else []


def _tokens_arrived(session: StageSession, event: TokensArrived) -> list[Command]:
    """Make the next step of sampled tokens, unless it was guessed right and is on its way already."""
    end = session.prompt_tokens + event.index + len(event.tokens)
    if end <= session.known_to:
        return []
    position, newest = end - 1, event.tokens[-1]
    drafts = event.drafts[: max(0, min(MAX_VERIFIED - 1, session.max_tokens - 1 - end))]  # the last token is never computed
    step = StageStep(
        position,
        1 + len(drafts),
        StepKind.VERIFY if drafts else StepKind.DECODE,
        sample=1 + len(drafts),
        committed=end,
        ids=(newest, *drafts),
    )
    if session.prompt_tokens + event.index != session.known_to:
        return [RejectStep(step, f"answer token {event.index} came where {session.known_to - session.prompt_tokens} was due")]
    session.known_to = end
    session.output.sampled_at(position)
    while session.guesses and session.guesses[0].start < position:
        session.guesses.popleft()
    if session.guesses and (session.guesses[0].start, session.guesses[0].ids[0]) == (position, newest):
        return []
    session.inbox = deque(waiting for waiting in session.inbox if waiting.kind is not StepKind.VERIFY)
    session.guesses.clear()
    if step.end > session.max_tokens:
        return [RejectStep(step, f"position {position} is past the {session.max_tokens} reserved")]
    if drafts:
        session.guesses.append(step)
    session._accept(step)
    return session._next() if session.state in (StageState.IDLE, StageState.WAITING, StageState.READY) else []


def _tokens_guessed(session: StageSession, event: TokensGuessed) -> list[Command]:
    """Make a step of guesses behind the newest step, if there is room and that step has not been answered."""
    ids = event.ids[: max(0, min(MAX_VERIFIED, session.max_tokens - 1 - session.due))]
    if not ids or len(session.guesses) >= STEP_WINDOW or session.due < session.known_to:
        return []
    step = StageStep(session.due, len(ids), StepKind.VERIFY, len(ids), committed=session.known_to, ids=ids)
    session.guesses.append(step)
    session.due = step.end
    session.inbox.append(step)
    return session._next() if session.state is StageState.IDLE else []


def _step_begun(session: StageSession, event: StepBegun) -> list[Command]:
    step = session.inbox[0]
    divisible = session.first and step.prefill
    if event.tokens != step.tokens and not (divisible and 0 < event.tokens < step.tokens):
        raise IllegalTransition(f"{event.tokens} of {step.tokens} tokens of a {step.kind} step began")
    session.inbox.popleft()
    commands: list[Command] = []
    if event.tokens < step.tokens:
        rest = step.start + event.tokens
        session.inbox.appendleft(replace(step, start=rest, tokens=step.tokens - event.tokens))
        step = replace(step, tokens=event.tokens, sample=0, committed=rest)
    elif not (session.first and step.ids):
        session.input.begun += 1
        if step.kind is not StepKind.DECODE:
            commands.append(Acknowledge(session.input.next_seq, session.input.credit))
    step = session._within_credit(step)
    if step.kind is not StepKind.REFILL:
        if step.start < session.computed:
            commands.append(Truncate(step.start))
        session.computed = step.end
    session.computing, session.state = step, StageState.COMPUTING
    return commands


def _step_computed(session: StageSession, event: StepComputed) -> list[Command]:
    step, session.computing = session.computing, None
    assert step is not None
    return [*session._deliver(step, event), *session._next()]


def _acknowledged(session: StageSession, event: OutputAcknowledged) -> list[Command]:
    session.output.acknowledge(event.next_seq, event.credit)
    return session._next() if session.state in (StageState.WAITING, StageState.READY) else []


def _granted(session: StageSession, event: TokensGranted) -> list[Command]:
    session.token_credit = event.credit
    return session._next() if session.state in (StageState.WAITING, StageState.READY) else []


def _ended(session: StageSession, event: StageEnded) -> list[Command]:
    session.state, session.reason = StageState.ENDED, event.reason
    session.inbox.clear()
    session.input.early.clear()
    session.output.clear()
    session.guesses.clear()
    session.replay_to = 0
    return [] if session.computing is not None else [FreeKv(event.reason)]


def _computed_after_end(session: StageSession, event: StepComputed) -> list[Command]:
    session.computing = None
    return [FreeKv(session.reason)]


def _ignore(session: StageSession, event: Event) -> list[Command]:
    return []


_WORKS = (StageState.IDLE, StageState.WAITING, StageState.READY)
_ignored = Transition(_ignore)
_ends = Transition(_ended, (StageState.ENDED,))

TRANSITIONS: dict[tuple[Enum, type[Any]], Transition] = {
    (StageState.OPEN, StageResumed): Transition(_resumed, _WORKS),
    (StageState.OPEN, StepArrived): Transition(_step_arrived),
    (StageState.OPEN, OutputAcknowledged): Transition(_acknowledged),
    (StageState.OPEN, TokensGranted): Transition(_granted),
    (StageState.OPEN, TokensArrived): _ignored,
    (StageState.OPEN, StageEnded): _ends,
    (StageState.READY, StepBegun): Transition(_step_begun, (StageState.COMPUTING,)),
    (StageState.COMPUTING, StepComputed): Transition(_step_computed, _WORKS),
    (StageState.ENDED, StepComputed): Transition(_computed_after_end),
}
for _state in (*_WORKS, StageState.COMPUTING):
    _others = tuple(state for state in _WORKS if state is not _state) if _state is not StageState.COMPUTING else ()
    TRANSITIONS[_state, StepArrived] = Transition(_step_arrived, _others)
    TRANSITIONS[_state, TokensArrived] = Transition(_tokens_arrived, _others)
    TRANSITIONS[_state, TokensGuessed] = Transition(_tokens_guessed, _others)
    TRANSITIONS[_state, OutputAcknowledged] = Transition(_acknowledged, _others)
    TRANSITIONS[_state, TokensGranted] = Transition(_granted, _others)
    TRANSITIONS[_state, StageEnded] = _ends
    TRANSITIONS[_state, StageResumed] = _ignored  # a repeated RESUME
for _event in (StageResumed, StepArrived, TokensArrived, TokensGuessed, TokensGranted, OutputAcknowledged, StageEnded):
    TRANSITIONS[StageState.ENDED, _event] = _ignored
StageSession.table = TRANSITIONS
