"""Every message of the system, on one page. `SPEC.md` beside this file says the same for other languages.

A message is a frozen struct with a type number; its fields are the frame's msgpack header, and what a tensor or a file holds is the
frame's raw payload. Numbers are never reused. A field that a reader does not know is skipped; a field that a reader needs and an
older writer does not send has a default. An unknown number is answered with ERROR, and the link lives on.

Who sends what to whom, for one session:

    coordinator --OPEN--> every stage's peer            --OPENED--> coordinator
    coordinator --PROMPT--> first stage                 (token ids; one per prefill chunk)
    stage i --ACTIVATION--> stage i+1                   (hidden states)
    stage i+1 --TAKEN--> stage i                        (prefill: one more may come)
    last stage --TOKEN--> first stage and coordinator
    coordinator --CREDIT--> first stage                 (how far decoding may run ahead of the client)
    coordinator --RENEW--> every stage's peer           (the lease)
    any stage --FAILED--> coordinator
    coordinator --CLOSE--> every stage's peer           --CLOSED--> coordinator
"""

from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar

import msgspec

from meshd.types import (
    Advert,
    LayerRange,
    ModelCard,
    ModelId,
    PeerId,
    Plan,
    SamplingParams,
    SessionId,
    TokenLogprobs,
)

PROTOCOL_VERSION = (1, 0)
"""(major, minor): peers of another major version refuse each other; a higher minor only adds."""

FEATURES: frozenset[str] = frozenset({"f32"})
"""What this build offers beside the version; the peers use what both have."""


class Lane(IntEnum):
    """A link is two connections, so that a small message never waits behind a large one."""

    CONTROL = 0
    BULK = 1


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The root. `number` is the type on the wire."""

    number: ClassVar[int] = 0
    default_lane: ClassVar[Lane] = Lane.CONTROL


class Request(Message, frozen=True, kw_only=True):
    """Waits for one reply that carries the same `request`; answered from what is there if it comes twice."""

    request: int


class Reply(Message, frozen=True, kw_only=True):
    """Answers the request of this number."""

    request: int


REGISTRY: dict[int, type[Message]] = {}


def _message(number: int) -> Callable[[type[Message]], type[Message]]:
    def register(cls: type[Message]) -> type[Message]:
        if number in REGISTRY:
            raise ValueError(f"message number {number} is taken by {REGISTRY[number].__name__}")
        cls.number = number
        REGISTRY[number] = cls
        return cls

    return register


# --- the link itself ---------------------------------------------------------------------------------------------------


@_message(1)
class Hello(Message, frozen=True, kw_only=True):
    """First frame of each connection, from both sides. Whoever dialled says which lane this is and of which link."""

    version: tuple[int, int]
    features: tuple[str, ...]
    software: str
    peer: PeerId
    """Must be the hash of the key in the TLS certificate."""
    name: str
    incarnation: int
    """Drawn at start: a peer that restarts is a new incarnation."""
    link: int
    """Drawn by the dialler; both connections of a link carry it. The side that answers repeats it."""
    lane: int
    max_header: int
    max_payload: int
    port: int
    """Where the sender listens for links."""


@_message(2)
class Error(Reply, frozen=True, kw_only=True):
    """A request (or, with request 0, a message) could not be met."""

    request: int = 0
    code: str
    message: str
    hint: str = ""
    session: SessionId | None = None
    number_of: int = 0
    """The type number that this answers, if it was unknown."""


@_message(3)
class Heartbeat(Message, frozen=True, kw_only=True):
    """Each side, every 0.5 s, on the control lane."""

    sequence: int
    sent_ns: int
    """The sender's monotonic clock; the answer repeats it."""


@_message(4)
class HeartbeatAck(Message, frozen=True, kw_only=True):
    sequence: int
    sent_ns: int


@_message(5)
class Goodbye(Message, frozen=True, kw_only=True):
    """The sender leaves on purpose; its silence is no fault."""

    reason: str


@_message(6)
class Probe(Request, frozen=True, kw_only=True):
    """Payload: filler. The reply comes when all of it has arrived; with `echo` it comes back whole."""

    default_lane: ClassVar[Lane] = Lane.BULK
    echo: bool = False


@_message(7)
class ProbeAck(Reply, frozen=True, kw_only=True):
    received_bytes: int
    receive_s: float
    """From the first byte of the payload to the last, by the receiver's clock."""


# --- the mesh ----------------------------------------------------------------------------------------------------------


@_message(16)
class Advertise(Message, frozen=True, kw_only=True):
    """The sender's present advert, whole: on link-up and on change."""

    advert: Advert


@_message(17)
class FetchHeader(Request, frozen=True, kw_only=True):
    """Asks for what a coordinator needs of a model that it does not have: tokenizer and template."""

    model: ModelId


@_message(18)
class HeaderData(Reply, frozen=True, kw_only=True):
    """Payload: the head of the GGUF file, up to its tensor data."""

    default_lane: ClassVar[Lane] = Lane.BULK
    card: ModelCard
    sha256: str
    """Of the payload."""


# --- placement ---------------------------------------------------------------------------------------------------------


@_message(32)
class Place(Request, frozen=True, kw_only=True):
    """Load these layers and hold room for their KV. The reply comes when they are WARM; progress is in the adverts."""

    model: ModelId
    ref: str
    layers: LayerRange
    kv_tokens: int
    deadline_ms: int


@_message(33)
class Placed(Reply, frozen=True, kw_only=True):
    layers: LayerRange
    kv_tokens: int


@_message(34)
class Unplace(Request, frozen=True, kw_only=True):
    """Let go of a model: at once if no session uses it, else when the last one ends (DRAINING)."""

    model: ModelId


@_message(35)
class Unplaced(Reply, frozen=True, kw_only=True):
    freed_bytes: int


# --- sessions ----------------------------------------------------------------------------------------------------------


class SessionMessage(Message, frozen=True, kw_only=True):
    """Carries its epoch: a message of an older epoch than the receiver's is dropped."""

    session: SessionId
    epoch: int


@_message(48)
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


@_message(49)
class Opened(Reply, frozen=True, kw_only=True):
    session: SessionId
    epoch: int
    blocks: int


@_message(50)
class Prompt(SessionMessage, frozen=True, kw_only=True):
    """Payload: token ids, `i32[tokens]`. One prefill chunk for the first stage."""

    step: int
    position: int
    tokens: int
    last: bool
    """The chunk that ends the prompt: the last stage samples after it."""
    deadline_ms: int = 0


@_message(51)
class Activation(SessionMessage, frozen=True, kw_only=True):
    """Payload: hidden states `[tokens, hidden]`, row-major, little-endian, of `dtype`."""

    step: int
    stage: int
    """The stage that is to compute on it."""
    position: int
    tokens: int
    hidden: int
    dtype: str
    sample: bool
    deadline_ms: int = 0
    """Time left for the step when it was sent; 0: none."""
    compute_ns: int = 0
    """Spent computing so far in this step, for telemetry."""
    ids: tuple[int, ...] = ()
    """The prompt's tokens in this chunk, when the last stage's penalties need them."""


@_message(52)
class Token(SessionMessage, frozen=True, kw_only=True):
    """The last stage's pick. Goes to the first stage, whose next step it is, and to the coordinator."""

    step: int
    """The step that made it."""
    index: int
    """Of the answer's tokens, from 0."""
    token: int
    logprobs: TokenLogprobs | None = None
    final: bool = False
    finish: str = ""
    """`stop` (end of sequence) or `length`, if final."""
    compute_ns: int = 0


@_message(53)
class Credit(SessionMessage, frozen=True, kw_only=True):
    """Answer tokens up to `index` (exclusive) may be made."""

    index: int


@_message(54)
class Renew(SessionMessage, frozen=True, kw_only=True):
    """The lease runs for `lease_ms` more."""

    lease_ms: int


@_message(55)
class Failed(SessionMessage, frozen=True, kw_only=True):
    """A stage can't go on; the coordinator decides what next."""

    step: int
    stage: int
    code: str
    message: str


@_message(56)
class Close(SessionMessage, frozen=True, kw_only=True):
    """Free what this session holds. Idempotent."""

    reason: str


@_message(57)
class Closed(SessionMessage, frozen=True, kw_only=True):
    freed_blocks: int


@_message(58)
class Taken(SessionMessage, frozen=True, kw_only=True):
    """A stage has begun this prefill step: the one before it may send one more. Bounds what waits between two stages."""

    step: int
    stage: int
