"""Messages that load, free and drain layers on peers."""

from meshd.protocol.messages.base import Reply, Request, message
from meshd.types import LayerRange, ModelId


@message(32)
class Place(Request, frozen=True, kw_only=True):
    """Load these layers and hold room for their KV. The reply comes when they are WARM; progress is in the adverts."""

    model: ModelId
    ref: str
    layers: LayerRange
    kv_tokens: int
    deadline_ms: int
    standby: bool = False
    """A copy for when another peer is lost: it takes no other load's memory and gives its own to any that is not one. A wish
    for the same layers that is none turns it into an ordinary load."""
    pinned: bool = False
    """Somebody said where these layers are to lie: they are not placed elsewhere because that would be faster."""


@message(33)
class Placed(Reply, frozen=True, kw_only=True):
    layers: LayerRange
    kv_tokens: int


@message(34)
class Unplace(Request, frozen=True, kw_only=True):
    """Let go of a model: at once if no session uses it, else when the last one ends (DRAINING)."""

    model: ModelId


@message(35)
class Unplaced(Reply, frozen=True, kw_only=True):
    freed_bytes: int


@message(36)
class Drain(Request, frozen=True, kw_only=True):
    """Take no new work and let what runs move away; the reply comes when nothing is left, or at the deadline."""

    deadline_ms: int
    undo: bool = False


@message(37)
class Drained(Reply, frozen=True, kw_only=True):
    sessions_left: int
