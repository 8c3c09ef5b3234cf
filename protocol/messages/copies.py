"""Messages that copy a stage's KV to another peer."""

from typing import Annotated, ClassVar

from meshd.bounds import MAX_COORDINATORS, Epoch, Millis, StageIndex, Text, Tokens, at_most
from meshd.protocol.messages.base import Lane, Reply, Request, SessionMessage, make_printable, message
from meshd.types import LayerRange, ModelId, PeerId, SessionId


@message(68)
class ExpectCopy(Request, frozen=True, kw_only=True):
    """Reserve KV for a copy of a session's layers, which `source` will send. The receiver need not hold these layers.

    From the session's coordinator to the target of a copy. The target takes KV from no peer that the coordinator did not name.
    A repeat gets the same answer.
    """

    session: SessionId
    epoch: Epoch
    source: PeerId
    """The peer that computes these layers in this epoch."""
    model: ModelId
    layers: LayerRange
    tokens: Tokens
    """Tokens to reserve KV for."""
    lease_ms: Millis
    predecessors: Annotated[tuple[PeerId, ...], at_most(MAX_COORDINATORS)] = ()
    """See `Open.predecessors`."""


@message(69)
class CopyExpected(Reply, frozen=True, kw_only=True):
    session: SessionId
    epoch: Epoch


@message(60)
class Mirror(SessionMessage, frozen=True, kw_only=True):
    """Copy the KV of a stage to another peer while the stage runs."""

    stage: StageIndex
    target: PeerId | None
    """The peer that receives the copy. None: stop all copies of the stage."""
    eager: bool = False
    """Send the KV of each token as soon as possible (for a move), not in whole blocks (for a mirror)."""


@message(61)
class Mirrored(SessionMessage, frozen=True, kw_only=True):
    """Progress of a copy. Sent when the copy catches up, when it fails, and every 0.5 s while it is behind."""

    stage: StageIndex
    target: PeerId
    held: Tokens
    filled: Tokens
    """Number of positions in the KV of the stage."""
    error: Text = ""
    """Why the copy has ended, while the stage continues. Empty: it has not ended."""

    def __post_init__(self) -> None:
        make_printable(self, "error")


@message(62)
class KvOffer(Request, frozen=True, kw_only=True):
    """Begin to send the copy that the coordinator announced to the receiver with EXPECT_COPY. A repeat gets the same answer."""

    session: SessionId
    epoch: Epoch
    layers: LayerRange
    valid: Tokens = 0
    """KV that the receiver already has beyond this position may belong to other tokens, so it is sent again."""


@message(63)
class KvAccepted(Reply, frozen=True, kw_only=True):
    held: Tokens
    """Number of positions that the replying peer holds already."""


@message(64)
class KvBlocks(SessionMessage, frozen=True, kw_only=True):
    """Payload: what the layers hold of positions `[position, position + tokens)`, with its kind (SPEC.md, section 10)."""

    default_lane: ClassVar[Lane] = Lane.BULK
    layers: LayerRange
    position: Tokens
    tokens: Tokens


@message(65)
class KvStored(SessionMessage, frozen=True, kw_only=True):
    layers: LayerRange
    held: Tokens
    error: Text = ""
    """Why the sender has dropped the copy. Empty: it has not dropped it."""

    def __post_init__(self) -> None:
        make_printable(self, "error")
