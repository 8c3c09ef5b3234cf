"""The state of the simulated network: paths between peers, links, and the links' pipes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from meshd.agents.links.restoring.history import LinkHistory, SentFrame
from meshd.protocol.messages import Lane, Message
from meshd.protocol.transport import Buffer
from meshd.types import LinkStats, PeerId


@dataclass(slots=True)
class Path:
    """The properties of the network from one peer to another. The opposite direction has a separate path."""

    delay_s: float
    jitter_s: float
    bandwidth_bytes_s: float
    slow: float = 1.0
    """Factor by which delay and transfer take longer."""
    cut: bool = False
    blocked_since: float | None = None
    """Time since which the sender's heartbeats don't arrive, because of a cut or a frozen sender. None: they arrive."""
    measured: LinkStats | None = None
    """The measurement of the present link over this path. None: not measured yet."""


@dataclass(slots=True)
class HarshNetwork:
    """Shares (0 to 1) of messages that are dropped, repeated, or overtaken by later messages, none of which happens with TCP."""

    drop: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0


@dataclass(slots=True)
class Pipe:
    """One lane of a link in one direction."""

    free_at: float = 0.0
    """Time at which the transfer of all messages so far ends, and the next one can begin."""
    last_arrival: float = 0.0
    queued_bytes: int = 0
    frames: int = 0
    """Frames of steps that have not arrived."""
    held: list[tuple[Message, bytes, int, bool]] = field(default_factory=list)
    """Messages that wait for a cut to heal: message, payload, size in bytes, and whether it is counted (not a repeat)."""
    waiting: list[Callable[[], None]] = field(default_factory=list)
    """Callbacks of senders that wait for room."""


@dataclass(frozen=True, slots=True)
class SimFrame(SentFrame):
    """A message that may have to be sent again, with its size in the simulated network."""

    message: Message
    whole: Buffer | None
    bytes: int


@dataclass(eq=False, slots=True)
class Link:
    """A connection between two peers, with two lanes in each direction."""

    number: int
    lost_after: float = float("inf")
    """Time after which messages no longer arrive, because the link broke. Infinity: the link is not broken."""
    lossy: bool = False
    """Whether a message of this link was dropped."""
    up: set[PeerId] = field(default_factory=set)
    """Peers at which the link is up."""
    ended: set[PeerId] = field(default_factory=set)
    """Peers that have ended the link on their side."""
    pipes: dict[tuple[PeerId, Lane], Pipe] = field(default_factory=dict)
    """The pipes of both directions, by sender and lane."""
    histories: dict[PeerId, LinkHistory] = field(default_factory=dict)
    """Each peer's own. A link that restores another one has the same."""
    restores: bool = False
    restorable: bool = True
    """Whether the order of messages has been that of TCP, so that they can be counted."""
    waiting: dict[PeerId, list[Callable[[], None]]] = field(default_factory=dict)
    """Callbacks of senders that wait for room, while the link is broken."""
    reason: str = ""
    """Why the link broke."""
