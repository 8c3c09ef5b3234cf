"""Messages that load, free and drain layers on peers."""

from typing import ClassVar

from meshd.bounds import Count, Millis, Size, Text, Tokens
from meshd.numerics import UNKNOWN, NumericsId
from meshd.protocol.messages.base import Reply, Request, message
from meshd.types import LayerRange, ModelId


@message(32)
class Place(Request, frozen=True, kw_only=True):
    """Load these layers and reserve their KV. The reply is sent when they are WARM; adverts show the progress."""

    lasting: ClassVar[bool] = True
    model: ModelId
    ref: Text
    layers: LayerRange
    kv_tokens: Tokens
    deadline_ms: Millis
    standby: bool = False
    """Load a standby copy, for the case that another peer is lost. The copy never displaces another load, and any load that is
    not a standby copy may displace it. A PLACE of the same layers without `standby` makes it an ordinary load."""
    pinned: bool = False
    """A user chose this peer for the layers, so they are not moved to a faster one."""
    numerics: NumericsId = UNKNOWN
    """How the sender expects the receiver to compute. A receiver with another id refuses. Empty: in any way."""


@message(33)
class Placed(Reply, frozen=True, kw_only=True):
    layers: LayerRange
    kv_tokens: Tokens


@message(34)
class Unplace(Request, frozen=True, kw_only=True):
    """Free a model: at once if no session uses it, otherwise when the last session ends (DRAINING)."""

    lasting: ClassVar[bool] = True
    model: ModelId


@message(35)
class Unplaced(Reply, frozen=True, kw_only=True):
    freed_bytes: Size


@message(36)
class Drain(Request, frozen=True, kw_only=True):
    """Accept no new work, and let sessions move away; with `undo`, accept work again.

    The reply is sent when no session is left, or at the deadline.
    """

    lasting: ClassVar[bool] = True
    deadline_ms: Millis
    undo: bool = False


@message(37)
class Drained(Reply, frozen=True, kw_only=True):
    sessions_left: Count
