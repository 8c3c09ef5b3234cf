"""What happens to a session (`Event`), and what its machine wants done (`Command`)."""

from dataclasses import dataclass

from meshd.agents.session.plan.resume import ResumePoint, StageHeld
from meshd.errors import MeshdError
from meshd.types import FinishReason, PeerId, Plan, TokenLogprobs

NOTHING = StageHeld(0)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan was chosen: the first one, one after a loss, or a better one. Its epoch is one higher than the last."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class PlanFailed:
    """No plan is possible now."""

    error: MeshdError


@dataclass(frozen=True, slots=True)
class StageOpened:
    epoch: int
    stage: int
    held: StageHeld = NOTHING
    """What the stage already has of the session."""


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A stage refused to open, or can't go on."""

    epoch: int
    stage: int
    error: MeshdError
    blame: PeerId | None = None


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
    blame: PeerId | None = None


@dataclass(frozen=True, slots=True)
class Suspend:
    """Nobody reads it now: free everything but the tokens."""


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    """Somebody wants to read on."""


@dataclass(frozen=True, slots=True)
class Released:
    """Another peer coordinates it from now on, with the stages as they are."""

    error: MeshdError


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """Another peer had continued it, and gave it back."""

    used: int
    """The highest epoch that it can have used."""
    tokens: tuple[tuple[int, TokenLogprobs | None, FinishReason | None], ...]
    """All of the answer's."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    pass


Event = (
    Planned
    | PlanFailed
    | StageOpened
    | StageFailed
    | TokenArrived
    | TokensRead
    | StopMatched
    | PeerGone
    | DeadlinePassed
    | Suspend
    | ResumeRequested
    | Released
    | Reclaimed
    | CancelRequested
)


@dataclass(frozen=True, slots=True)
class OpenStages:
    epoch: int
    plan: Plan
    credit: int
    answered: int
    """Answer tokens that are known."""


@dataclass(frozen=True, slots=True)
class ResumeStages:
    """All are open: send each the position that it resumes from."""

    epoch: int
    plan: Plan
    held: tuple[StageHeld, ...]
    positions: tuple[ResumePoint, ...]


@dataclass(frozen=True, slots=True)
class SendPrompt:
    """The known tokens from `start` on, to the first stage."""

    epoch: int
    plan: Plan
    start: int


@dataclass(frozen=True, slots=True)
class Replan:
    """Find another plan: `lost` peers' KV is gone, peers to `avoid` are distrusted now."""

    reason: str
    lost: frozenset[PeerId]
    avoid: frozenset[PeerId]


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
class EmitSuspended:
    """Nothing follows until it is resumed. None: its reader left."""

    error: MeshdError | None


@dataclass(frozen=True, slots=True)
class EmitEnd:
    """Nothing follows. `error` only with ERROR, and when another peer took over."""

    reason: FinishReason
    error: MeshdError | None = None


Command = OpenStages | ResumeStages | SendPrompt | Replan | EmitToken | GrantCredit | CloseStages | EmitSuspended | EmitEnd
