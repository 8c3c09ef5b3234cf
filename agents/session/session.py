"""One request on the peer that coordinates it, as a pure state machine: events in, commands out.

House rules of this file: no I/O, no clock, no text, only tokens, peers and plans. `TRANSITIONS` lists every event that may come in
each state; any other event raises and changes nothing. Events of an older epoch are dropped before the table is consulted, because
the network may deliver them late.

The diagram in `docs/state-machines.md` is generated from the table.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from meshd.agents.machine import Machine, Transition
from meshd.agents.session.events import (
    CancelRequested,
    CloseStages,
    Command,
    DeadlinePassed,
    EmitEnd,
    EmitSuspended,
    EmitToken,
    Event,
    GrantCredit,
    OpenStages,
    PeerGone,
    PlanFailed,
    Planned,
    Reclaimed,
    Released,
    Replan,
    ResumeRequested,
    ResumeStages,
    SendPrompt,
    StageFailed,
    StageOpened,
    StopMatched,
    Suspend,
    TokenArrived,
    TokensRead,
)
from meshd.agents.session.plan.resume import StageHeld, resume_points
from meshd.errors import MeshdError, PeerLost, UsageError
from meshd.types import FinishReason, PeerId, Plan, SessionId


class SessionState(Enum):
    """States of a session's machine. The table of transitions is at the end of this file."""

    NEW = "new"
    OPENING = "opening"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    RECOVERING = "recovering"
    """The session waits for another plan."""
    SUSPENDED = "suspended"
    """Nothing runs; the session can be resumed."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({SessionState.FINISHED, SessionState.FAILED, SessionState.CANCELLED})
RUNNING = frozenset({SessionState.OPENING, SessionState.PREFILLING, SessionState.DECODING, SessionState.RECOVERING})

_STATUS = {
    SessionState.SUSPENDED: "suspended",
    SessionState.FINISHED: "completed",
    SessionState.FAILED: "failed",
    SessionState.CANCELLED: "cancelled",
}

CREDIT_TOKENS = 64
"""Number of tokens that decoding may run ahead of the client."""
MAX_ATTEMPTS = 12
"""Changes of plan without a token between them, after which the session is suspended."""


@dataclass(slots=True)
class Session(Machine[Event, Command]):
    """State of one session. Only `handle` changes it."""

    id: SessionId
    prompt_tokens: int
    state: SessionState = SessionState.NEW
    epoch: int = 0
    plan: Plan | None = None
    opened: dict[int, StageHeld] = field(default_factory=dict)
    """Stages that are open in this epoch, and what each still had of the session."""
    tokens: list[int] = field(default_factory=list)
    credit: int = CREDIT_TOKENS
    """Answer tokens before this index may be made."""
    opened_credit: int = 0
    """The credit that the present epoch's OPEN carries."""
    holders: set[PeerId] = field(default_factory=set)
    """Peers that may hold memory of this session: they are sent RENEW, and CLOSE at the end."""
    joined: set[PeerId] = field(default_factory=set)
    """Peers of the present plan that held nothing of the session before."""
    lost: set[PeerId] = field(default_factory=set)
    """Peers that were lost since the last token."""
    avoid: set[PeerId] = field(default_factory=set)
    """Peers that were at fault since the last token."""
    attempts: int = 0
    kv_plan: Plan | None = None
    """The last plan whose stages all opened: its peers hold the KV, while a newer plan may still be opening."""
    finish: FinishReason | None = None
    error: MeshdError | None = None

    @classmethod
    def restored(
        cls,
        session: SessionId,
        prompt_tokens: int,
        *,
        epoch: int,
        plan: Plan | None,
        tokens: list[int],
        finish: FinishReason | None,
    ) -> "Session":
        """Returns: the session that a record describes: ended if it has a finish reason, otherwise suspended."""
        state = SessionState.SUSPENDED
        if finish is not None:
            state = SessionState.CANCELLED if finish is FinishReason.CANCELLED else SessionState.FINISHED
        restored = cls(session, prompt_tokens, state, epoch, plan=plan, kv_plan=plan, tokens=tokens, finish=finish)
        restored.credit += len(tokens)
        return restored

    @property
    def running(self) -> bool:
        """Whether the session makes tokens, or waits for a plan to make them under."""
        return self.state in RUNNING or self.state is SessionState.NEW

    @property
    def released(self) -> bool:
        """Whether another peer coordinates the session now."""
        return self.state is SessionState.CANCELLED and self.error is not None

    @property
    def status(self) -> str:
        """See `service.Generation.status`."""
        if self.released:
            return "suspended"
        return _STATUS.get(self.state, "in_progress" if self.tokens else "queued")

    @property
    def waits_for_client(self) -> bool:
        """Whether decoding has used up its credit. Decoding continues when the client has read more tokens."""
        return len(self.tokens) >= self.credit

    @property
    def begun(self) -> bool:
        """Whether a plan has run, or there are tokens: a new plan then continues from them."""
        return self.kv_plan is not None or bool(self.tokens)

    @property
    def known(self) -> int:
        """Number of tokens of prompt and answer."""
        return self.prompt_tokens + len(self.tokens)

    def validate(self) -> None:
        """Check the invariants that hold between events; tests call it after each event. Raises: AssertionError."""
        if self.plan is None and self.state in (SessionState.OPENING, SessionState.PREFILLING, SessionState.DECODING):
            raise AssertionError("the session runs without a plan")
        if (self.state in TERMINAL) != (self.finish is not None):
            raise AssertionError("a finish reason is set in a state that is not final, or missing in one that is")
        if len(self.tokens) > self.credit:
            raise AssertionError("more tokens than credit")
        if self.plan is not None and not set(self.opened) <= set(range(len(self.plan.stages))):
            raise AssertionError("a stage is open that is not in the plan")
        if self.attempts > MAX_ATTEMPTS and self.begun:
            raise AssertionError(f"more than {MAX_ATTEMPTS} changes of plan without a token")
        if self.state not in RUNNING and self.holders:
            raise AssertionError("peers hold memory of a session that does not run")
        if self.state is SessionState.RECOVERING and not self.begun and self.holders:
            raise AssertionError("peers hold memory of a session that waits for its first plan")

    def title(self) -> str:
        return f"session {self.id}"

    def is_stale(self, event: Event) -> bool:
        epoch = getattr(event, "epoch", self.epoch)
        return isinstance(epoch, int) and epoch != self.epoch

    def _close(self, reason: str) -> list[Command]:
        """Have all peers free their memory of the session."""
        peers, self.holders = tuple(sorted(self.holders)), set()
        return [CloseStages(self.epoch, peers, reason)] if peers else []

    def _end(self, state: SessionState, reason: FinishReason, error: MeshdError | None = None) -> list[Command]:
        self.state, self.finish, self.error = state, reason, error
        return [*self._close(reason.value), EmitEnd(reason, error)]

    def _suspend(self, error: MeshdError | None) -> list[Command]:
        self.state, self.error = SessionState.SUSPENDED, error
        commands = self._close("suspended")
        self.epoch += 1  # messages that are still in transit become stale
        return [*commands, EmitSuspended(error)]

    def _recover(self, reason: str, *, lost: PeerId | None = None, avoid: PeerId | None = None) -> list[Command]:
        """Ask for another plan after a fault. `lost`: a peer whose KV is gone. `avoid`: a peer at fault."""
        commands = self._undo_opening() if self.state is SessionState.OPENING else []
        if lost is not None:
            self.lost.add(lost)
            self.holders.discard(lost)
        if avoid is not None:
            self.avoid.add(avoid)
        self.state = SessionState.RECOVERING
        return [*commands, Replan(reason, frozenset(self.lost), frozenset(self.avoid))]

    def _undo_opening(self) -> list[Command]:
        """Free what the stages of a plan that opened only in part have reserved. A session that waits for memory holds none that
        another session waits for."""
        assert self.plan is not None
        peers = tuple(sorted(self.holders.intersection(self.plan.peers)))
        self.holders -= self.joined
        return [CloseStages(self.epoch, peers, "the plan did not open", undo=True)] if peers else []


def _planned(session: Session, event: Planned) -> list[Command]:
    if session.begun and session.attempts >= MAX_ATTEMPTS:
        error = session.error or PeerLost(f"{session.attempts} plans in a row failed", hint="resume it later")
        return session._suspend(error)
    session.attempts += 1
    session.plan = event.plan
    session.epoch += 1
    session.credit = max(session.credit, len(session.tokens) + 1)  # resumed stages sample one token even without credit
    session.opened, session.opened_credit = {}, session.credit
    session.joined = set(event.plan.peers) - session.holders
    session.holders.update(event.plan.peers)
    session.state = SessionState.OPENING
    return [OpenStages(session.epoch, event.plan, session.credit, len(session.tokens))]


def _plan_failed(session: Session, event: PlanFailed) -> list[Command]:
    if session.begun and not isinstance(event.error, UsageError):
        return session._suspend(event.error)
    return session._end(SessionState.FAILED, FinishReason.ERROR, event.error)


def _stage_opened(session: Session, event: StageOpened) -> list[Command]:
    plan = session.plan
    assert plan is not None
    session.opened[event.stage] = event.held
    if len(session.opened) < len(plan.stages):
        return []
    session.state, session.kv_plan = SessionState.PREFILLING, plan
    commands: list[Command] = []
    if session.credit > session.opened_credit:
        commands.append(GrantCredit(session.epoch, plan, session.credit))
    if session.epoch == 1:
        return [*commands, SendPrompt(session.epoch, plan, 0)]
    held = tuple(session.opened[stage] for stage in range(len(plan.stages)))
    points = resume_points(held, session.known)
    dropped = tuple(sorted(session.holders.difference(plan.peers)))
    session.holders.difference_update(dropped)
    if dropped:
        commands.append(CloseStages(session.epoch - 1, dropped, "not in the new plan"))
    return [
        *commands,
        ResumeStages(session.epoch, plan, held, points),
        SendPrompt(session.epoch, plan, points[0].start),
    ]


def _token_arrived(session: Session, event: TokenArrived) -> list[Command]:
    if event.index < len(session.tokens):
        return []  # a repeat: the token was emitted already
    if event.index > len(session.tokens):
        last = session.plan.peers[-1] if session.plan is not None else None
        return session._recover(f"token {len(session.tokens)} of the answer was lost in transit", avoid=last)
    session.state = SessionState.DECODING
    session.attempts = 0
    session.lost.clear()
    session.avoid.clear()
    return _emit(session, event)


def _token_in_recovery(session: Session, event: TokenArrived) -> list[Command]:
    """Emit a token that was made before the fault: it is still valid."""
    return _emit(session, event) if event.index == len(session.tokens) < session.credit else []


def _emit(session: Session, event: TokenArrived) -> list[Command]:
    session.tokens.append(event.token)
    commands: list[Command] = [EmitToken(event.index, event.token, event.logprobs, event.finish)]
    if event.finish is not None:
        commands += session._end(SessionState.FINISHED, event.finish)
    return commands


def _tokens_read(session: Session, event: TokensRead) -> list[Command]:
    wanted = event.index + CREDIT_TOKENS
    if wanted - session.credit < CREDIT_TOKENS // 2:
        return []  # credit is extended by half a window at a time, not with a message per token
    session.credit = wanted
    if session.plan is None or session.state in (SessionState.OPENING, SessionState.RECOVERING):
        return []  # a stage that is not open would drop it: OPEN carries it, or it is sent when all stages are open
    return [GrantCredit(session.epoch, session.plan, wanted)]


def _stop_matched(session: Session, event: StopMatched) -> list[Command]:
    return session._end(SessionState.FINISHED, FinishReason.STOP)


def _stage_failed(session: Session, event: StageFailed) -> list[Command]:
    session.error = event.error
    return session._recover(event.error.message, avoid=event.blame)


def _failed_in_recovery(session: Session, event: StageFailed) -> list[Command]:
    return []  # every neighbour of a failed stage reports it, and the first report started the recovery


def _peer_gone(session: Session, event: PeerGone) -> list[Command]:
    session.lost.add(event.peer)
    if session.plan is None or event.peer not in session.plan.peers:
        session.holders.discard(event.peer)
        return []
    layers = ", ".join(str(stage.layers) for stage in session.plan.stages if stage.peer == event.peer)
    session.error = PeerLost(f"the peer that held layers {layers} was lost: {event.reason}")
    return session._recover(session.error.message, lost=event.peer)


def _peer_gone_in_recovery(session: Session, event: PeerGone) -> list[Command]:
    """Ask for another plan, because the present search may choose the lost peer."""
    return session._recover(event.reason, lost=event.peer)


def _deadline_passed(session: Session, event: DeadlinePassed) -> list[Command]:
    session.error = PeerLost(f"no token arrived in time: {event.reason}")
    return session._recover(event.reason, avoid=event.blame)


def _suspend(session: Session, event: Suspend) -> list[Command]:
    return session._suspend(None)


def _resume(session: Session, event: ResumeRequested) -> list[Command]:
    session.attempts, session.error = 0, None
    session.avoid.clear()
    return session._recover("resumed")


def _released(session: Session, event: Released) -> list[Command]:
    session.holders.clear()
    return session._end(SessionState.CANCELLED, FinishReason.CANCELLED, event.error)


def _reclaimed(session: Session, event: Reclaimed) -> list[Command]:
    session.epoch = max(session.epoch, event.used)
    return []


def _cancel(session: Session, event: CancelRequested) -> list[Command]:
    return session._end(SessionState.CANCELLED, FinishReason.CANCELLED)


def _ignore(session: Session, event: Event) -> list[Command]:
    return []


_opens = Transition(_planned, (SessionState.OPENING, SessionState.SUSPENDED))
_ignored = Transition(_ignore)
_loses_a_stage = Transition(_stage_failed, (SessionState.RECOVERING,))
_loses_a_peer = Transition(_peer_gone, (SessionState.RECOVERING,))
_is_overdue = Transition(_deadline_passed, (SessionState.RECOVERING,))
_is_cancelled = Transition(_cancel, (SessionState.CANCELLED,))
_stops = Transition(_stop_matched, (SessionState.FINISHED,))
_takes_a_token = Transition(_token_arrived, (SessionState.DECODING, SessionState.RECOVERING, SessionState.FINISHED))

TRANSITIONS: dict[tuple[Enum, type[Any]], Transition] = {
    (SessionState.NEW, Planned): Transition(_planned, (SessionState.OPENING,)),
    (SessionState.NEW, PlanFailed): Transition(_plan_failed, (SessionState.FAILED,)),
    (SessionState.NEW, PeerGone): Transition(_peer_gone),
    (SessionState.NEW, CancelRequested): _is_cancelled,
    (SessionState.NEW, Suspend): _is_cancelled,
    (SessionState.OPENING, StageOpened): Transition(_stage_opened, (SessionState.PREFILLING,)),
    (SessionState.OPENING, StageFailed): _loses_a_stage,
    (SessionState.OPENING, DeadlinePassed): _is_overdue,
    (SessionState.PREFILLING, Planned): _opens,
    (SessionState.PREFILLING, StageFailed): _loses_a_stage,
    (SessionState.PREFILLING, TokenArrived): _takes_a_token,
    (SessionState.PREFILLING, DeadlinePassed): _is_overdue,
    (SessionState.DECODING, Planned): _opens,
    (SessionState.DECODING, StageFailed): _loses_a_stage,
    (SessionState.DECODING, TokenArrived): _takes_a_token,
    (SessionState.DECODING, StopMatched): _stops,
    (SessionState.DECODING, DeadlinePassed): _is_overdue,
    (SessionState.RECOVERING, Planned): _opens,
    (SessionState.RECOVERING, PlanFailed): Transition(_plan_failed, (SessionState.SUSPENDED, SessionState.FAILED)),
    (SessionState.RECOVERING, Reclaimed): Transition(_reclaimed),
    (SessionState.RECOVERING, StageOpened): _ignored,
    (SessionState.RECOVERING, StageFailed): Transition(_failed_in_recovery),
    (SessionState.RECOVERING, TokenArrived): Transition(_token_in_recovery, (SessionState.FINISHED,)),
    (SessionState.RECOVERING, StopMatched): _stops,
    (SessionState.RECOVERING, PeerGone): Transition(_peer_gone_in_recovery),
    (SessionState.RECOVERING, DeadlinePassed): _ignored,
    (SessionState.SUSPENDED, ResumeRequested): Transition(_resume, (SessionState.RECOVERING,)),
    (SessionState.SUSPENDED, CancelRequested): _is_cancelled,
    (SessionState.SUSPENDED, Released): Transition(_released, (SessionState.CANCELLED,)),
}
for _state in RUNNING:
    TRANSITIONS.setdefault((_state, PeerGone), _loses_a_peer)
    TRANSITIONS[_state, TokensRead] = Transition(_tokens_read)
    TRANSITIONS[_state, Suspend] = Transition(_suspend, (SessionState.SUSPENDED,))
    TRANSITIONS[_state, ResumeRequested] = _ignored
    TRANSITIONS[_state, Released] = Transition(_released, (SessionState.CANCELLED,))
    TRANSITIONS[_state, CancelRequested] = _is_cancelled
# After the end, and while the session is suspended, late messages may still arrive and the client may still read.
for _state in (*TERMINAL, SessionState.SUSPENDED):
    for _event in Event.__args__:
        if _event is not Planned:
            TRANSITIONS.setdefault((_state, _event), _ignored)
Session.table = TRANSITIONS
