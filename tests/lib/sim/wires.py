"""The state of the simulated network: paths between peers, and links with their pipes."""

from dataclasses import dataclass, field

from meshd.protocol.messages import Lane, Message
from meshd.types import LinkStats, PeerId


@dataclass(slots=True)
class Path:
    """One direction between two peers."""

    delay_s: float
    jitter_s: float
    bandwidth_bytes_s: float
    slow: float = 1.0
    cut: bool = False
    blocked_since: float | None = None
    """Since when no heartbeats of the sender arrive, because of a cut or a frozen sender."""
    told: tuple[float, LinkStats] | None = None


@dataclass(slots=True)
class Harsh:
    """How often a single message is dropped, repeated, or overtaken by later ones; such a network is worse than TCP."""

    drop: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0


@dataclass(slots=True)
class Pipe:
    """One lane in one direction."""

    free_at: float = 0.0
    last_arrival: float = 0.0
    queued_bytes: int = 0
    held: list[tuple[Message, bytes, int]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Link:
    number: int
    lost_after: float = float("inf")
    """It broke: what would arrive later does not."""
    lossy: bool = False
    up: set[PeerId] = field(default_factory=set)
    ended: set[PeerId] = field(default_factory=set)
    pipes: dict[tuple[PeerId, Lane], Pipe] = field(default_factory=dict)
