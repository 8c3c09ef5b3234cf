"""Messages that open, resume and end a session."""

from meshd.protocol.messages.base import Reply, Request, SessionMessage, message
from meshd.types import PeerId, Plan, SamplingParams, SessionId


@message(48)
class Open(Request, frozen=True, kw_only=True):
    """Reserve KV for a session's stage and be ready for its steps; a repeat of the same epoch answers the same."""

    session: SessionId
    epoch: int
    plan: Plan
    stage: int
    """Which of the plan's stages is the receiver's."""
    coordinator: PeerId
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool = False
    lease_ms: int
    credit: int
    """Answer tokens that may be made before the first CREDIT."""
    answered: int = 0
    """Answer tokens that are known already. The payload, for the last stage: `i32[prompt_tokens + answered]`, all known tokens,
    where its sampler needs them."""
    resume: bool = False
    """Keep what an older epoch left here for these layers, tell of it in OPENED, and wait for RESUME."""
    handed_over: bool = False
    """The coordinator before this one gave the session away: it may be linked here still."""


@message(49)
class Opened(Reply, frozen=True, kw_only=True):
    session: SessionId
    epoch: int
    blocks: int
    held: int = 0
    """Positions whose KV lies here, from 0 on."""
    mirrored: bool = False
    """What is held came as a copy from another peer."""
    kept_from: int = 0
    """Positions `[kept_from, kept_to)`: outputs of these layers that are kept and can be sent again."""
    kept_to: int = 0


@message(59)
class Resume(SessionMessage, frozen=True, kw_only=True):
    """All stages of a later epoch are open: go on. What the receiver has of the session for no stage of the epoch is freed."""

    stage: int
    start: int
    """Position of the first token that this stage computes; its KV up to there is valid."""
    send_from: int
    """The next stage wants outputs from this position on: those before `start` are sent from what was kept."""


@message(53)
class Credit(SessionMessage, frozen=True, kw_only=True):
    """Answer tokens up to `index` (exclusive) may be made."""

    index: int
    hold: bool = False
    """No more than these, whatever was granted before: the plan is about to change."""


@message(54)
class Renew(SessionMessage, frozen=True, kw_only=True):
    """The lease runs for `lease_ms` more."""

    lease_ms: int


@message(55)
class Failed(SessionMessage, frozen=True, kw_only=True):
    """A stage can't go on; the coordinator decides what next."""

    step: int
    stage: int
    code: str
    message: str
    blame: PeerId | None = None
    """Who is at fault, as far as the sender can tell."""


@message(56)
class Close(SessionMessage, frozen=True, kw_only=True):
    """Free what this session holds. Idempotent."""

    reason: str


@message(57)
class Closed(SessionMessage, frozen=True, kw_only=True):
    freed_blocks: int


@message(66)
class FetchProgress(Request, frozen=True, kw_only=True):
    """How far is this session at the receiver? Asked when nothing came for too long."""

    session: SessionId
    epoch: int


@message(67)
class ProgressData(Reply, frozen=True, kw_only=True):
    """Of each stage of the session at the sender."""

    stages: tuple[tuple[int, int, int, float], ...]
    """(stage, position due next, positions sent on, seconds that the sender's present step, of whatever session, computes)."""
