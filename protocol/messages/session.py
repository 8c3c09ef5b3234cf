"""Messages that open, resume and end a session."""

from typing import Annotated

import msgspec

from meshd.bounds import MAX_COORDINATORS, MAX_PEERS, Count, Epoch, Millis, Seconds, StageIndex, Text, Tokens, Word, at_most
from meshd.protocol.messages.base import Reply, Request, SessionMessage, make_printable, message
from meshd.types import PeerId, Plan, SamplingParams, SessionId


@message(48)
class Open(Request, frozen=True, kw_only=True):
    """Reserve KV for a session's stage at once, and prepare it for its steps. A repeat of the same epoch gets the same answer."""

    session: SessionId
    epoch: Epoch
    plan: Plan
    stage: StageIndex
    """Index of the receiver's stage in the plan."""
    coordinator: PeerId
    prompt_tokens: Tokens
    max_tokens: Tokens
    sampling: SamplingParams | None = None
    """For the last stage, which samples; the others get none."""
    ignore_eos: bool = False
    lease_ms: Millis
    deadline_ms: Millis
    """How long the stage may take to prepare, from the receipt of this message on."""
    credit: Tokens
    """For the first and the last stage: answer tokens that may be made before the first ACK of the coordinator."""
    answered: Tokens = 0
    """Answer tokens that are known already. Payload, for the last stage if its sampler needs them: all known tokens,
    `i32[prompt_tokens + answered]`."""
    resume: bool = False
    """Reuse KV and outputs of an older epoch for these layers: report them in OPENED, and wait for RESUME."""
    predecessors: Annotated[tuple[PeerId, ...], at_most(MAX_COORDINATORS)] = ()
    """The session's earlier coordinators, as its record names them. The receiver uses no KV that it has from any other coordinator,
    because only these peers had the session's tokens."""


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
    held_from: Tokens = 0
    """The stage can start at a position from `held_from` to `held`, or at 0: layers with a window keep no KV far behind it."""


@message(59)
class Resume(SessionMessage, frozen=True, kw_only=True):
    """All stages of a later epoch are open: continue. The receiver frees KV and outputs that no stage of the epoch uses."""

    stage: StageIndex
    start: Tokens
    """Position of the first token that this stage computes. The stage's KV before it is valid."""
    send_from: Tokens
    """First position whose output the next stage needs. Kept outputs are sent for `[send_from, start)`."""


@message(54)
class Renew(SessionMessage, frozen=True, kw_only=True):
    """Extend the lease to `lease_ms` from now."""

    lease_ms: Millis


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

    step: Tokens
    stage: StageIndex
    code: Word
    message: Text
    blame: PeerId | None = None
    """The peer at fault, as far as the sender knows. None: no peer is."""

    def __post_init__(self) -> None:
        make_printable(self, "message")


@message(56)
class Close(SessionMessage, frozen=True, kw_only=True):
    """Free everything that this epoch and older ones have of the session. Idempotent."""

    reason: Text
    undo: bool = False
    """Free only what this epoch reserved, because its plan did not open: what older epochs left stays for the next one."""

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


class StageProgress(msgspec.Struct, frozen=True, array_like=True):
    """How far one stage of a session has come."""

    stage: StageIndex
    due: Tokens
    """The next position that the stage expects."""
    sent: Tokens
    """Number of positions whose outputs the stage has sent to the next stage."""
    idle_s: Seconds
    """Seconds since the last bytes arrived on the lane of the stage's prefill steps, at most 3600."""


class RunningStep(msgspec.Struct, frozen=True, kw_only=True):
    """The step that a peer computes now. It may belong to any session."""

    session: SessionId | None
    """None: the peer computes something that belongs to no session, and a step has waited for that since `running_s`."""
    epoch: Epoch
    stage: StageIndex
    step: Tokens
    tokens: Tokens
    running_s: Seconds
    """Seconds for which the pass with this step was computed so far. Waits in a queue or for other peers do not count. Without
    a `session`: how long a step has waited."""
    predicted_s: Seconds = 0.0
    """How long all steps of the pass were expected to take, by the plans of their sessions. 0: unknown."""


@message(67)
class ProgressData(Reply, frozen=True, kw_only=True):
    """Progress of each of the session's stages at the sender, and what the sender computes now."""

    stages: Annotated[tuple[StageProgress, ...], at_most(MAX_PEERS)]
    running: RunningStep | None = None
    """None: nothing."""
