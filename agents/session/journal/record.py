"""The record of a session: all that another peer needs to continue it. Its coordinator and its deputies have it."""

from typing import Annotated

import msgspec

from meshd.agents.service import AnswerSecret, GenerationRequest, MeshOptions
from meshd.agents.session.journal.keys import key_of, session_of, session_with
from meshd.bounds import (
    MAX_COORDINATORS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOKENS,
    Epoch,
    Timestamp,
    TokenId,
    Tokens,
    Word,
    at_most,
)
from meshd.clock import Clock
from meshd.errors import ContextTooLong, InvalidRequest, ProtocolViolation
from meshd.types import FinishReason, ModelCard, ModelId, PeerId, Plan, SamplingParams, SessionId, TokenLogprobs

AnswerToken = tuple[TokenId, TokenLogprobs | None]
_MAX_RENDERER_BYTES = 8 << 20
"""Also the largest record."""

FINISHES = frozenset({"", *(reason.value for reason in FinishReason)})
"""The ends of an answer that a record knows; empty: it has not ended."""
MAX_TOKENS_BYTES = 10 * 2**20
"""Tokens of one record that another peer gets: a longer answer's later tokens are computed again after a loss. With the rest of the
record they fit into one message."""
TAKEOVER_EPOCHS = 1000
"""A new coordinator raises the recorded epoch by this much, to be above all epochs that the last one used but did not record."""


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A request with all defaults resolved, and the tokens so far. It gives the same answer on any peer."""

    session: SessionId
    key: Word
    """See `journal/keys.py`."""
    model: ModelId
    coordinator: PeerId
    coordinators: Annotated[tuple[PeerId, ...], at_most(MAX_COORDINATORS)] = ()
    """The coordinators before this one, oldest first, at most `MAX_COORDINATORS`. Stages use KV that these peers had computed."""
    epoch: Epoch
    """The highest epoch that the coordinator had used when it sent this record. It may have used later ones since."""
    prompt: Annotated[tuple[TokenId, ...], at_most(MAX_TOKENS)]
    max_tokens: Tokens
    open_ended: bool = False
    """The request named no limit of answer tokens: `max_tokens` may be lowered to what the first plan has KV for."""
    sampling: SamplingParams
    """Includes the seed that was drawn, if the client gave none."""
    ignore_eos: bool = False
    stop: Annotated[tuple[Annotated[str, at_most(MAX_STOP_CHARACTERS)], ...], at_most(MAX_STOPS)] = ()
    mesh: MeshOptions = MeshOptions()
    background: bool = False
    store: bool = True
    renderer: Annotated[bytes, at_most(_MAX_RENDERER_BYTES)] = msgspec.field(default=b"", name="edge")
    """See `GenerationRequest.renderer`."""
    created: Timestamp = 0.0
    """Unix time of the request in seconds, by the clock of the first coordinator."""
    plan: Plan | None = None
    """The last plan that ran: its peers may still have KV."""
    tokens: Annotated[tuple[AnswerToken, ...], at_most(MAX_TOKENS)] = ()
    finish: Word = ""
    """Why the answer ended; empty while the answer runs or is suspended."""
    suspended: bool = False
    """Whether the session is suspended. It is then resumed only for a client, or, with `background`, once its model can answer."""


def taken_over(record: SessionRecord, by: PeerId) -> SessionRecord:
    """Returns: the record as its next coordinator begins with it."""
    return msgspec.structs.replace(
        record,
        epoch=record.epoch + TAKEOVER_EPOCHS,
        coordinator=by,
        coordinators=followed_by(record.coordinators, record.coordinator),
    )


def followed_by(coordinators: tuple[PeerId, ...], last: PeerId) -> tuple[PeerId, ...]:
    """Returns: the earlier coordinators with one more at the end."""
    return (*(peer for peer in coordinators if peer != last), last)[-MAX_COORDINATORS:]


def new_record(
    request: GenerationRequest,
    card: ModelCard,
    prompt: tuple[int, ...],
    coordinator: PeerId,
    secret: AnswerSecret,
    clock: Clock,
) -> SessionRecord:
    """Returns: the record of a new request. `prompt`: its token ids. `secret`: the secret of the answer's id.

    Raises: ContextTooLong, InvalidRequest.
    """
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if max(prompt) >= card.spec.vocab or min(prompt) < 0:
        raise InvalidRequest(
            f"the prompt has a token id outside the vocabulary: ids go from 0 to {card.spec.vocab - 1}", param="prompt"
        )
    return SessionRecord(
        session=session_of(secret),
        key=key_of(secret),
        model=card.id,
        coordinator=coordinator,
        epoch=0,
        prompt=prompt,
        max_tokens=_max_tokens(request, card, len(prompt)),
        open_ended=request.max_tokens is None and request.mesh.context is None,
        sampling=request.sampling,
        ignore_eos=request.ignore_eos,
        stop=request.stop,
        mesh=request.mesh,
        background=request.background,
        store=request.store,
        renderer=request.renderer,
        created=clock.wall(),
    )


def _max_tokens(request: GenerationRequest, card: ModelCard, prompt_tokens: int) -> int:
    """Returns: the limit of answer tokens; by default as many as the context leaves. Raises: ContextTooLong, InvalidRequest."""
    context = request.mesh.context or card.spec.context_length
    if context > card.spec.context_length:
        raise InvalidRequest(f"the model's context is {card.spec.context_length} tokens, not {context}", param="mesh.context")
    left = context - prompt_tokens
    max_tokens = request.max_tokens if request.max_tokens is not None else left
    if left < 1 or max_tokens > left:
        asked = f"{prompt_tokens} in the prompt" + (f" and {max_tokens} for the answer" if request.max_tokens is not None else "")
        raise ContextTooLong(
            f"this model's context is {context} tokens, and {asked} are more", hint="shorten the prompt or max_tokens"
        )
    return max_tokens


def token_bytes(token: AnswerToken) -> int:
    """Returns: the bytes of a token in a record or message, at most."""
    logprobs = token[1]
    return 7 if logprobs is None else 22 + 15 * len(logprobs.top)


def first_part(record: SessionRecord, limit_bytes: int) -> SessionRecord:
    """Returns: the record with as many of its tokens as `limit_bytes` bytes hold. A record that lacks tokens has not ended."""
    size = 0
    for count, token in enumerate(record.tokens):
        size += token_bytes(token)
        if size > limit_bytes:
            return msgspec.structs.replace(record, tokens=record.tokens[:count], finish="", suspended=bool(record.finish))
    return record


def encode_record(record: SessionRecord) -> bytes:
    """Encode a record for the wire."""
    return msgspec.msgpack.encode(record)


def decode_record(data: bytes | memoryview) -> SessionRecord:
    """Decode a record from the wire. Raises: ProtocolViolation, also if its key is not the session's."""
    try:
        record = msgspec.msgpack.decode(data, type=SessionRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolViolation(f"a session's record cannot be decoded: {error}") from error
    if record.finish not in FINISHES:
        raise ProtocolViolation(f"the record of session {record.session} has an end that there is not: {record.finish}")
    if session_with(record.key) != record.session:
        raise ProtocolViolation(f"the record of session {record.session} was made by a peer that never had it: its key is wrong")
    return record
