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

A later epoch (after a loss, or to move a stage) resumes what is there:

    coordinator --OPEN(resume)--> every stage's peer    --OPENED(held, outputs kept)--> coordinator
    coordinator --RESUME(start, send_from)--> every stage's peer
    coordinator --PROMPT--> first stage                 (the known tokens from its start on)
    stage i --ACTIVATION--> stage i+1                   (kept outputs from send_from to start, then as computed)

A copy of a stage's KV on another peer (a mirror, or a move that prepares):

    coordinator --MIRROR(target)--> stage's peer
    stage's peer --KV_OFFER--> target                   --KV_ACCEPTED(held)--> stage's peer
    stage's peer --KV_BLOCKS--> target                  --KV_STORED(held)--> stage's peer
    stage's peer --MIRRORED(held, filled)--> coordinator
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

PROTOCOL_VERSION = (2, 0)
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
    standby: bool = False
    """A copy for when another peer is lost: it takes no other load's memory and gives its own to any that is not one. A wish
    for the same layers that is none turns it into an ordinary load."""
    pinned: bool = False
    """Somebody said where these layers are to lie: they are not placed elsewhere because that would be faster."""


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
    answered: int = 0
    """Answer tokens that are known already. The payload, for the last stage: `i32[prompt_tokens + answered]`, all known tokens,
    where its sampler needs them."""
    resume: bool = False
    """Keep what an older epoch left here for these layers, tell of it in OPENED, and wait for RESUME."""
    handed_over: bool = False
    """The coordinator before this one gave the session away: it may be linked here still."""


@_message(49)
class Opened(Reply, frozen=True, kw_only=True):
    session: SessionId
    epoch: int
    blocks: int
    held: int = 0
    """Positions whose KV lies here, from 0 on."""
    mirrored: bool = False
    """What is held came as a copy from another peer."""
    kept_from: int = 0
    """Positions `[kept_from, kept_to)`: outputs of these layers that are kept and can be sent again."""
    kept_to: int = 0


@_message(50)
class Prompt(SessionMessage, frozen=True, kw_only=True):
    """Payload: token ids, `i32[tokens]`. One prefill chunk for the first stage."""

    step: int
    """Of its first token: a step's number is its position."""
    tokens: int
    last: bool
    """The chunk that ends the known tokens: the last stage samples after it."""
    deadline_ms: int = 0


@_message(51)
class Activation(SessionMessage, frozen=True, kw_only=True):
    """Payload: hidden states `[tokens, hidden]`, row-major, little-endian, of `dtype`."""

    step: int
    stage: int
    """The stage that is to compute on it."""
    tokens: int
    hidden: int
    dtype: str
    sample: bool
    deadline_ms: int = 0
    """Time left for the step when it was sent; 0: none."""


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


@_message(53)
class Credit(SessionMessage, frozen=True, kw_only=True):
    """Answer tokens up to `index` (exclusive) may be made."""

    index: int
    hold: bool = False
    """No more than these, whatever was granted before: the plan is about to change."""


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
    blame: PeerId | None = None
    """Who is at fault, as far as the sender can tell."""


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


@_message(59)
class Resume(SessionMessage, frozen=True, kw_only=True):
    """All stages of a later epoch are open: go on. What the receiver has of the session for no stage of the epoch is freed."""

    stage: int
    start: int
    """Position of the first token that this stage computes; its KV up to there is valid."""
    send_from: int
    """The next stage wants outputs from this position on: those before `start` are sent from what was kept."""


@_message(60)
class Mirror(SessionMessage, frozen=True, kw_only=True):
    """Copy the KV of a stage to another peer as it grows, behind live traffic."""

    stage: int
    target: PeerId | None
    """None: stop."""
    eager: bool = False
    """Send each token's KV as soon as the last one is stored (a move), not by the block (a mirror)."""


@_message(61)
class Mirrored(SessionMessage, frozen=True, kw_only=True):
    """How far a copy is: when it catches up, when it fails, and every 0.5 s until then."""

    stage: int
    target: PeerId
    held: int
    filled: int
    """Positions that the stage itself has."""
    error: str = ""
    """The copy can't go on, and why; the stage serves on."""


@_message(62)
class KvOffer(Request, frozen=True, kw_only=True):
    """Reserve KV for a copy of a session's layers; the receiver must hold these layers. A repeat answers the same."""

    session: SessionId
    epoch: int
    coordinator: PeerId
    model: ModelId
    layers: LayerRange
    tokens: int
    """To reserve."""
    lease_ms: int
    valid: int = 0
    """What lies at the receiver beyond this position may be of other tokens: it is sent again."""


@_message(63)
class KvAccepted(Reply, frozen=True, kw_only=True):
    held: int
    """Positions that lie there already."""


@_message(64)
class KvBlocks(SessionMessage, frozen=True, kw_only=True):
    """Payload: KV of positions `[position, position + tokens)`, f32 `[layers, 2, tokens, kv_heads, head_dim]`."""

    default_lane: ClassVar[Lane] = Lane.BULK
    layers: LayerRange
    position: int
    tokens: int


@_message(65)
class KvStored(SessionMessage, frozen=True, kw_only=True):
    layers: LayerRange
    held: int
    error: str = ""
    """The copy is not kept here any more, and why."""


@_message(66)
class FetchProgress(Request, frozen=True, kw_only=True):
    """How far is this session at the receiver? Asked when nothing came for too long."""

    session: SessionId
    epoch: int


@_message(67)
class ProgressData(Reply, frozen=True, kw_only=True):
    """Of each stage of the session at the sender."""

    stages: tuple[tuple[int, int, int, float], ...]
    """(stage, position due next, positions sent on, seconds that the sender's present step, of whatever session, computes)."""


# --- the journal: a session survives its coordinator -------------------------------------------------------------------


@_message(80)
class Journal(Request, frozen=True, kw_only=True):
    """Keep this session's record, whole. Payload: the record (msgpack). The receiver is its deputy now."""

    default_lane: ClassVar[Lane] = Lane.BULK
    session: SessionId
    epoch: int


@_message(81)
class Journaled(Reply, frozen=True, kw_only=True):
    session: SessionId


@_message(82)
class JournalTokens(SessionMessage, frozen=True, kw_only=True):
    """The answer's tokens from `index` on, and its end if it has come."""

    index: int
    tokens: tuple[tuple[int, TokenLogprobs | None], ...]
    finish: str = ""


@_message(83)
class JournalDrop(SessionMessage, frozen=True, kw_only=True):
    """From the coordinator: the record is not needed any more. From a deputy: it does not have the record, or not all of it."""


@_message(84)
class FindSession(Request, frozen=True, kw_only=True):
    """Do you coordinate this session, or keep its record?"""

    session: SessionId


@_message(85)
class SessionFound(Reply, frozen=True, kw_only=True):
    coordinates: bool
    keeps: bool
    epoch: int = 0
    tokens: int = 0


@_message(86)
class FetchSession(Request, frozen=True, kw_only=True):
    """Asks for a session's record; with `take` the receiver stops coordinating it and the sender goes on."""

    session: SessionId
    take: bool = False


@_message(87)
class SessionData(Reply, frozen=True, kw_only=True):
    """Payload: the record (msgpack)."""

    default_lane: ClassVar[Lane] = Lane.BULK
    session: SessionId
    epoch: int


@_message(88)
class EndSession(Request, frozen=True, kw_only=True):
    """Cancel a session that the receiver coordinates; with `forget` its record goes too."""

    session: SessionId
    forget: bool = False


@_message(89)
class SessionEnded(Reply, frozen=True, kw_only=True):
    known: bool


@_message(90)
class FetchStory(Request, frozen=True, kw_only=True):
    """What happened to a session at the receiver?"""

    session: SessionId


@_message(91)
class StoryData(Reply, frozen=True, kw_only=True):
    """Payload: JSON list of `{"at": monotonic seconds, "what": str, ...}`, oldest first."""

    default_lane: ClassVar[Lane] = Lane.BULK
    now: float
    """The sender's clock when it answered: with half the round trip it places the events in the asker's time."""


@_message(92)
class Move(Request, frozen=True, kw_only=True):
    """Asks the coordinator of a session to move all its stages at one peer (None: any) to another."""

    session: SessionId
    target: PeerId
    source: PeerId | None = None


@_message(93)
class Moved(Reply, frozen=True, kw_only=True):
    pause_s: float
    """Between the last token before the change of plan and the first one after it."""
    plan: Plan


# --- leaving -----------------------------------------------------------------------------------------------------------


@_message(36)
class Drain(Request, frozen=True, kw_only=True):
    """Take no new work and let what runs move away; the reply comes when nothing is left, or at the deadline."""

    deadline_ms: int
    undo: bool = False


@_message(37)
class Drained(Reply, frozen=True, kw_only=True):
    sessions_left: int


# --- weights from peer to peer -----------------------------------------------------------------------------------------


@_message(40)
class FetchManifest(Request, frozen=True, kw_only=True):
    """Which tensors of a model lie at the receiver?"""

    model: ModelId


@_message(41)
class ManifestData(Reply, frozen=True, kw_only=True):
    """Payload: the manifest (msgpack): where each tensor lies in the file, its SHA-256, and whether the sender has it."""

    default_lane: ClassVar[Lane] = Lane.BULK
    card: ModelCard
    sha256: str
    """Of the payload."""


@_message(42)
class FetchWeights(Request, frozen=True, kw_only=True):
    """Bytes `[offset, offset + length)` of a model's file, all of them in tensors that the receiver has."""

    model: ModelId
    offset: int
    length: int


@_message(43)
class WeightData(Reply, frozen=True, kw_only=True):
    """Payload: the bytes."""

    default_lane: ClassVar[Lane] = Lane.BULK
    offset: int
