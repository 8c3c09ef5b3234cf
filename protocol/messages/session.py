"""Messages that open, resume and end a session."""

from typing import Annotated

from meshd.bounds import MAX_PEERS, Count, Epoch, Millis, Seconds, StageIndex, Text, Tokens, Word, at_most
from meshd.protocol.messages.base import Reply, Request, SessionMessage, make_printable, message
from meshd.types import PeerId, Plan, SamplingParams, SessionId


@message(48)
class Open(Request, frozen=True, kw_only=True):
    """Reserve KV for a session's stage and prepare for its steps. A repeat of the same epoch gets the same answer."""

    session: SessionId
    epoch: Epoch
    plan: Plan
    stage: StageIndex
    """Index of the receiver's stage in the plan."""
    coordinator: PeerId
    prompt_tokens: Tokens
    max_tokens: Tokens
    sampling: SamplingParams
    ignore_eos: bool = False
    lease_ms: Millis
    credit: Tokens
    """Answer tokens that may be generated before the first CREDIT."""
    answered: Tokens = 0
    """Answer tokens that are known already. Payload, for the last stage if its sampler needs them: all known tokens,
    `i32[prompt_tokens + answered]`."""
    resume: bool = False
    """Reuse KV and outputs of an older epoch for these layers: report them in OPENED, and wait for RESUME."""
    handed_over: bool = False
    """The previous coordinator handed the session over, so its link with the receiver may still be up."""


@message(49)
class Opened(Reply, frozen=True, kw_only=True):
    session: SessionId
    epoch: Epoch
    blocks: Count
    held: Tokens = 0
    """The sender holds KV of positions `[0, held)`."""
    mirrored: bool = False
    """The held KV was copied from another peer."""
    kept_from: Tokens = 0
    """The stage's outputs for positions `[kept_from, kept_to)` are kept and can be sent again."""
    kept_to: Tokens = 0


@message(59)
class Resume(SessionMessage, frozen=True, kw_only=True):
    """All stages of a later epoch are open: continue. The receiver frees KV and outputs that no stage of the epoch uses."""

    stage: StageIndex
    start: Tokens
    """Position of the first token that this stage computes. The stage's KV before it is valid."""
    send_from: Tokens
    """First position whose output the next stage needs. Kept outputs are sent for `[send_from, start)`."""


@message(53)
class Credit(SessionMessage, frozen=True, kw_only=True):
    """Answer tokens up to `index` (exclusive) may be generated."""

    index: Tokens
    hold: bool = False
    """Replace higher credits granted before: the plan is about to change."""


@message(54)
class Renew(SessionMessage, frozen=True, kw_only=True):
    """Extend the lease to `lease_ms` from now."""

    lease_ms: Millis


@message(55)
class Failed(SessionMessage, frozen=True, kw_only=True):
    """A stage can't continue. The coordinator makes a new plan or ends the session."""

    step: Tokens
    stage: StageIndex
    code: Word
    message: Text
    blame: PeerId | None = None
    """The peer at fault, as far as the sender knows."""

    def __post_init__(self) -> None:
        make_printable(self, "message")


@message(56)
class Close(SessionMessage, frozen=True, kw_only=True):
    """Free everything of this session. Idempotent."""

    reason: Text

    def __post_init__(self) -> None:
        make_printable(self, "reason")


@message(57)
class Closed(SessionMessage, frozen=True, kw_only=True):
    freed_blocks: Count


@message(66)
class FetchProgress(Request, frozen=True, kw_only=True):
    """Request a session's progress at the receiver. Sent when no token has arrived for too long."""

    session: SessionId
    epoch: Epoch


@message(67)
class ProgressData(Reply, frozen=True, kw_only=True):
    """Progress of each of the session's stages at the sender."""

    stages: Annotated[tuple[tuple[StageIndex, Tokens, Tokens, Seconds], ...], at_most(MAX_PEERS)]
    """(stage, next position expected, position up to which outputs were sent, seconds since the sender began its current step,
    which may belong to any session)."""
