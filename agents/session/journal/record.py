"""What a session is made of: enough to go on with it on any peer. Kept by its coordinator, and by the deputy that takes over."""

import msgspec

from meshd.agents.service import MeshOptions
from meshd.errors import ProtocolViolation
from meshd.types import ModelId, PeerId, Plan, SamplingParams, SessionId, TokenLogprobs

AnswerToken = tuple[int, TokenLogprobs | None]


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The request as it was understood, and the tokens so far. The same record gives the same answer anywhere."""

    session: SessionId
    model: ModelId
    coordinator: PeerId
    epoch: int
    """The highest that its coordinator has used, as far as the holder of the record knows."""
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    """With the seed that was drawn, if the client gave none."""
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    mesh: MeshOptions = MeshOptions()
    background: bool = False
    store: bool = True
    edge: bytes = b""
    created: float = 0.0
    """Seconds since the epoch, by the first coordinator."""
    plan: Plan | None = None
    """The last one that ran: where KV may still lie."""
    tokens: tuple[AnswerToken, ...] = ()
    finish: str = ""
    """Empty while it runs or is suspended."""
    suspended: bool = False
    """Nothing runs, and nobody is to go on with it unless a client asks."""


def encode_record(record: SessionRecord) -> bytes:
    """For the wire."""
    return msgspec.msgpack.encode(record)


def decode_record(data: bytes | memoryview) -> SessionRecord:
    """Raises: ProtocolViolation."""
    try:
        return msgspec.msgpack.decode(data, type=SessionRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolViolation(f"a session's record arrived torn: {error}") from error
