"""The inputs (`Event`) and outputs (`Command`) of a session's state machine."""

from dataclasses import dataclass

from meshd.agents.session.plan.resume import ResumePoint, StageHeld
from meshd.errors import MeshdError
from meshd.types import FinishReason, PeerId, Plan, TokenLogprobs

NOTHING_HELD = StageHeld(0)


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan was chosen: the first one, one after a loss, or a better one. It starts a new epoch."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class PlanFailed:
    """No plan is possible now."""

    error: MeshdError


@dataclass(frozen=True, slots=True)
class StageOpened:
    epoch: int
    stage: int
    held: StageHeld = NOTHING_HELD
    """KV and outputs that the stage still has of the session, from an earlier epoch."""


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A stage refused to open, or cannot continue."""

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
    """The client's readers have read all answer tokens before `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The text contains a stop string: the answer is complete."""


@dataclass(frozen=True, slots=True)
class PeerGone:
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The answer made no progress for too long."""

    reason: str
    blame: PeerId | None = None


@dataclass(frozen=True, slots=True)
class Suspend:
    """Free everything but the tokens, so that the session can be resumed later."""


@dataclass(frozen=True, slots=True)
class ResumeRequested:
    """Continue a suspended answer."""


@dataclass(frozen=True, slots=True)
class Released:
    """Another peer coordinates the session from now on. The session's stages stay open for that peer."""

    error: MeshdError


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """This peer has taken the session back from another coordinator."""

    used: int
    """The highest epoch that the other coordinator can have used."""


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
    """Number of answer tokens that the coordinator has."""


@dataclass(frozen=True, slots=True)
class ResumeStages:
    """Send every stage of a later plan its resume point, now that all stages are open."""

    epoch: int
    plan: Plan
    held: tuple[StageHeld, ...]
    points: tuple[ResumePoint, ...]


@dataclass(frozen=True, slots=True)
class SendPrompt:
    """Send the first stage the known tokens from position `start` on."""

    epoch: int
    plan: Plan
    start: int


@dataclass(frozen=True, slots=True)
class Replan:
    """Find another plan. The KV at `lost` peers is gone; peers to `avoid` were at fault since the last token."""

    reason: str
    lost: frozenset[PeerId]
    avoid: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class EmitToken:
    index: int
    token: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None
    """Why the answer ends with this token; None: it continues. STOP means an end-of-sequence token, which has no text."""


@dataclass(frozen=True, slots=True)
class GrantCredit:
    """Acknowledge the tokens that have arrived to the first and the last stage, and let them make those before index `credit`."""

    epoch: int
    plan: Plan
    credit: int


@dataclass(frozen=True, slots=True)
class CloseStages:
    epoch: int
    peers: tuple[PeerId, ...]
    reason: str
    undo: bool = False
    """Free only what this epoch reserved: KV of older epochs stays for the next plan."""


@dataclass(frozen=True, slots=True)
class EmitSuspended:
    """The answer is suspended: nothing is emitted until it is resumed."""

    error: MeshdError | None
    """Why the answer was suspended. None: it had no reader any more, or this peer stops."""


@dataclass(frozen=True, slots=True)
class EmitEnd:
    """The answer has ended: nothing more is emitted."""

    reason: FinishReason
    error: MeshdError | None = None
    """Set if `reason` is ERROR, or if it is CANCELLED because another peer has taken the session over."""


Command = OpenStages | ResumeStages | SendPrompt | Replan | EmitToken | GrantCredit | CloseStages | EmitSuspended | EmitEnd
