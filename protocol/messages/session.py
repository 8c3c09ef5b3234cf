"""Messages that open, resume and end a session."""

from meshd.protocol.messages.base import Reply, Request, SessionMessage, message
from meshd.types import PeerId, Plan, SamplingParams, SessionId


@message(48)
class Open(Request, frozen=True, kw_only=True):
    """Reserve KV for a session's stage and prepare for its steps. A repeat of the same epoch gets the same answer."""

    session: SessionId
    epoch: int
    plan: Plan
    stage: int
    """Index of the receiver's stage in the plan."""
    coordinator: PeerId
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool = False
    lease_ms: int
    credit: int
    """Answer tokens that may be generated before the first CREDIT."""
    answered: int = 0
    """Answer tokens that are known already. Payload, for the last stage if its sampler needs them: all known tokens,
    `i32[prompt_tokens + answered]`."""
    resume: bool = False
    """Reuse KV and outputs of an older epoch for these layers: report them in OPENED, and wait for RESUME."""
    predecessors: tuple[PeerId, ...] = ()
    """The session's earlier coordinators, as its record names them. The receiver uses no KV that it has from any other coordinator,
    because only these peers had the session's tokens."""


@message(49)
class Opened(Reply, frozen=True, kw_only=True):
    session: SessionId
    epoch: int
    blocks: int
    held: int = 0
    """The sender holds KV of positions `[0, held)`."""
    mirrored: bool = False
    """The held KV was copied from another peer."""
    kept_from: int = 0
    """The stage's outputs for positions `[kept_from, kept_to)` are kept and can be sent again."""
    kept_to: int = 0


@message(59)
class Resume(SessionMessage, frozen=True, kw_only=True):
    """All stages of a later epoch are open: continue. The receiver frees KV and outputs that no stage of the epoch uses."""

    stage: int
    start: int
    """Position of the first token that this stage computes. The stage's KV before it is valid."""
    send_from: int
    """First position whose output the next stage needs. Kept outputs are sent for `[send_from, start)`."""


@message(53)
class Credit(SessionMessage, frozen=True, kw_only=True):
    """Answer tokens up to `index` (exclusive) may be generated."""

    index: int
    hold: bool = False
    """Replace higher credits granted before: the plan is about to change."""


@message(54)
class Renew(SessionMessage, frozen=True, kw_only=True):
    """Extend the lease to `lease_ms` from now."""

    lease_ms: int


@message(70)
class HandOver(Request, frozen=True, kw_only=True):
    """From now on, peer `to` coordinates the session. From its coordinator to the peers that have its KV or its record."""

    session: SessionId
    to: PeerId


@message(71)
class HandedOver(Reply, frozen=True, kw_only=True):
    known: bool
    """The sender of HAND_OVER was the session's coordinator, as far as the receiver knew."""


@message(55)
class Failed(SessionMessage, frozen=True, kw_only=True):
    """A stage can't continue. The coordinator makes a new plan or ends the session."""

    step: int
    stage: int
    code: str
    message: str
    blame: PeerId | None = None
    """The peer at fault, as far as the sender knows."""


@message(56)
class Close(SessionMessage, frozen=True, kw_only=True):
    """Free everything of this session. Idempotent."""

    reason: str


@message(57)
class Closed(SessionMessage, frozen=True, kw_only=True):
    freed_blocks: int


@message(66)
class FetchProgress(Request, frozen=True, kw_only=True):
    """Request a session's progress at the receiver. Sent when no token has arrived for too long."""

    session: SessionId
    epoch: int


@message(67)
class ProgressData(Reply, frozen=True, kw_only=True):
    """Progress of each of the session's stages at the sender."""

    stages: tuple[tuple[int, int, int, float], ...]
    """(stage, next position expected, position up to which outputs were sent, seconds since the sender began its current step,
    which may belong to any session)."""
