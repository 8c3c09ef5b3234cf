"""One request on the peer that coordinates it, as a pure state machine: events in, commands out.

House rules of this file: no I/O, no clock, no text. It knows tokens, peers and the plan. `TRANSITIONS` is the whole truth about
which event may come in which state; an event that is not in the table raises and changes nothing. Events of an older epoch are
dropped before the table is asked, because the network may deliver them late.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from meshd.errors import MeshdError, PeerLost
from meshd.types import FinishReason, PeerId, Plan, SessionId, TokenLogprobs


class State(Enum):
    """Where a session stands."""

    NEW = "new"
    OPENING = "opening"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})


class IllegalTransition(RuntimeError):
    """A bug of ours: this event can't come in this state."""


# Events: what happened.


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan was chosen; a later one (after a loss) has a higher epoch."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class StageOpened:
    epoch: int
    stage: int


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A stage refused to open, or can't go on."""

    epoch: int
    stage: int
    error: MeshdError


@dataclass(frozen=True, slots=True)
class TokenArrived:
    epoch: int
    index: int
    token: int
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class TokensRead:
    """The client's side has taken all answer tokens before `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The text reached a stop string."""


@dataclass(frozen=True, slots=True)
class PeerGone:
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """Nothing came for too long."""

    reason: str


@dataclass(frozen=True, slots=True)
class CancelRequested:
    pass


Event = Planned | StageOpened | StageFailed | TokenArrived | TokensRead | StopMatched | PeerGone | DeadlinePassed | CancelRequested

# Commands: what the actor is to do.


@dataclass(frozen=True, slots=True)
class OpenStages:
    epoch: int
    plan: Plan
    credit: int


@dataclass(frozen=True, slots=True)
class SendPrompt:
    epoch: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class EmitToken:
    index: int
    token: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None
    """STOP: an end-of-sequence token, which has no text."""


@dataclass(frozen=True, slots=True)
class GrantCredit:
    epoch: int
    peer: PeerId
    index: int


@dataclass(frozen=True, slots=True)
class CloseStages:
    epoch: int
    peers: tuple[PeerId, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class EmitEnd:
    """Nothing follows. `error` only with ERROR."""

    reason: FinishReason
    error: MeshdError | None = None


Command = OpenStages | SendPrompt | EmitToken | GrantCredit | CloseStages | EmitEnd

CREDIT_TOKENS = 64
"""How far decoding may run ahead of the client."""


@dataclass(slots=True)
class Session:
    """State of one session. Only `handle` changes it."""

    id: SessionId
    state: State = State.NEW
    epoch: int = 0
    plan: Plan | None = None
    opened: set[int] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    credit: int = CREDIT_TOKENS
    finish: FinishReason | None = None
    error: MeshdError | None = None

    def handle(self, event: Event) -> list[Command]:
        """Apply one event. Raises: IllegalTransition, with nothing changed."""
        if self._stale(event):
            return []
        transition = TRANSITIONS.get((self.state, type(event)))
        if transition is None:
            raise IllegalTransition(f"session {self.id}: {type(event).__name__} in state {self.state.value}")
        return transition(self, event)

    def validate(self) -> None:
        """Invariants that hold between events; tests call it after each."""
        if (self.state is State.NEW) != (self.plan is None) and self.state not in TERMINAL:
            raise AssertionError("a plan and the state disagree")
        if (self.state in TERMINAL) != (self.finish is not None):
            raise AssertionError("a reason to end and the state disagree")
        if len(self.tokens) > self.credit:
            raise AssertionError("more tokens than credit")
        if self.plan is not None and not self.opened <= set(range(len(self.plan.stages))):
            raise AssertionError("a stage opened that is not in the plan")

    def _stale(self, event: Event) -> bool:
        epoch = getattr(event, "epoch", self.epoch)
        return isinstance(epoch, int) and epoch != self.epoch

    def _end(self, state: State, reason: FinishReason, error: MeshdError | None = None) -> list[Command]:
        self.state, self.finish, self.error = state, reason, error
        commands: list[Command] = []
        if self.plan is not None:
            peers = tuple(dict.fromkeys(self.plan.peers))
            commands.append(CloseStages(self.epoch, peers, reason.value))
        commands.append(EmitEnd(reason, error))
        return commands


def _planned(session: Session, event: Planned) -> list[Command]:
    session.plan = event.plan
    session.epoch += 1
    session.opened = set()
    session.state = State.OPENING
    return [OpenStages(session.epoch, event.plan, session.credit)]


def _stage_opened(session: Session, event: StageOpened) -> list[Command]:
    assert session.plan is not None
    session.opened.add(event.stage)
    if len(session.opened) < len(session.plan.stages):
        return []
    session.state = State.PREFILLING
    return [SendPrompt(session.epoch, session.plan)]


def _token_arrived(session: Session, event: TokenArrived) -> list[Command]:
    if event.index < len(session.tokens):
        return []  # a repeat: the client saw it already
    if event.index > len(session.tokens):
        return _fail(session, PeerLost(f"token {len(session.tokens)} of the answer was lost on the way"))
    session.state = State.DECODING
    session.tokens.append(event.token)
    commands: list[Command] = [EmitToken(event.index, event.token, event.logprobs, event.finish)]
    if event.finish is not None:
        commands += session._end(State.FINISHED, event.finish)
    return commands


def _tokens_read(session: Session, event: TokensRead) -> list[Command]:
    wanted = event.index + CREDIT_TOKENS
    if session.plan is None or wanted - session.credit < CREDIT_TOKENS // 2:
        return []  # half a window at a time: a message for each token would cost more than it bounds
    session.credit = wanted
    return [GrantCredit(session.epoch, session.plan.stages[0].peer, wanted)]


def _stop_matched(session: Session, event: StopMatched) -> list[Command]:
    return session._end(State.FINISHED, FinishReason.STOP)


def _stage_failed(session: Session, event: StageFailed) -> list[Command]:
    return _fail(session, event.error)


def _peer_gone(session: Session, event: PeerGone) -> list[Command]:
    if session.plan is None or event.peer not in session.plan.peers:
        return []
    layers = ", ".join(str(stage.layers) for stage in session.plan.stages if stage.peer == event.peer)
    hint = "ask again: the cluster plans anew with the peers that are left"
    return _fail(session, PeerLost(f"the peer that held layers {layers} was lost: {event.reason}", hint=hint))


def _deadline_passed(session: Session, event: DeadlinePassed) -> list[Command]:
    return _fail(session, PeerLost(f"no token came in time: {event.reason}", hint="ask again"))


def _cancel(session: Session, event: CancelRequested) -> list[Command]:
    return session._end(State.CANCELLED, FinishReason.CANCELLED)


def _fail(session: Session, error: MeshdError) -> list[Command]:
    return session._end(State.FAILED, FinishReason.ERROR, error)


def _ignore(session: Session, event: Event) -> list[Command]:
    return []


TRANSITIONS: dict[tuple[State, type[Any]], Callable[[Session, Any], list[Command]]] = {
    (State.NEW, Planned): _planned,
    (State.NEW, PeerGone): _peer_gone,
    (State.NEW, CancelRequested): _cancel,
    (State.OPENING, StageOpened): _stage_opened,
    (State.OPENING, StageFailed): _stage_failed,
    (State.OPENING, PeerGone): _peer_gone,
    (State.OPENING, DeadlinePassed): _deadline_passed,
    (State.OPENING, CancelRequested): _cancel,
    (State.PREFILLING, StageFailed): _stage_failed,
    (State.PREFILLING, TokenArrived): _token_arrived,
    (State.PREFILLING, PeerGone): _peer_gone,
    (State.PREFILLING, DeadlinePassed): _deadline_passed,
    (State.PREFILLING, CancelRequested): _cancel,
    (State.DECODING, StageFailed): _stage_failed,
    (State.DECODING, TokenArrived): _token_arrived,
    (State.DECODING, TokensRead): _tokens_read,
    (State.DECODING, StopMatched): _stop_matched,
    (State.DECODING, PeerGone): _peer_gone,
    (State.DECODING, DeadlinePassed): _deadline_passed,
    (State.DECODING, CancelRequested): _cancel,
}
# After the end the network may still deliver; the client may still read.
for _state in TERMINAL:
    for _event in (StageOpened, StageFailed, TokenArrived, TokensRead, StopMatched, PeerGone, DeadlinePassed, CancelRequested):
        TRANSITIONS[_state, _event] = _ignore
