"""Messages that copy a stage's KV to another peer."""

from typing import ClassVar

from meshd.protocol.messages.base import Lane, Reply, Request, SessionMessage, message
from meshd.types import LayerRange, ModelId, PeerId, SessionId


@message(60)
class Mirror(SessionMessage, frozen=True, kw_only=True):
    """Copy the KV of a stage to another peer as it grows, behind live traffic."""

    stage: int
    target: PeerId | None
    """None: stop."""
    eager: bool = False
    """Send each token's KV as soon as the last one is stored (a move), not by the block (a mirror)."""


@message(61)
class Mirrored(SessionMessage, frozen=True, kw_only=True):
    """Progress of a copy. Sent when it catches up, when it fails, and every 0.5 s until then."""

    stage: int
    target: PeerId
    held: int
    filled: int
    """Positions that the stage itself has."""
    error: str = ""
    """Why the copy has ended; the stage continues. Empty: it has not."""


@message(62)
class KvOffer(Request, frozen=True, kw_only=True):
    """Reserve KV for a copy of a session's layers; the receiver must hold these layers. A repeat answers the same."""

    session: SessionId
    epoch: int
    coordinator: PeerId
    model: ModelId
    layers: LayerRange
    tokens: int
    """Tokens to reserve KV for."""
    lease_ms: int
    valid: int = 0
    """The receiver's KV beyond this position may belong to other tokens, and is sent again."""


@message(63)
class KvAccepted(Reply, frozen=True, kw_only=True):
    held: int
    """Positions that the receiver holds already."""


@message(64)
class KvBlocks(SessionMessage, frozen=True, kw_only=True):
    """Payload: KV of positions `[position, position + tokens)`, f32 `[layers, 2, tokens, kv_heads, head_dim]`."""

    default_lane: ClassVar[Lane] = Lane.BULK
    layers: LayerRange
    position: int
    tokens: int


@message(65)
class KvStored(SessionMessage, frozen=True, kw_only=True):
    layers: LayerRange
    held: int
    error: str = ""
    """Why the sender has dropped the copy. Empty: it has not."""
