"""The record of a session: all that another peer needs to continue it. Its coordinator and its deputies have it."""

from typing import Annotated

import msgspec

from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.bounds import MAX_STOP_CHARACTERS, MAX_STOPS, MAX_TOKENS, Epoch, Timestamp, TokenId, Tokens, Word, at_most
from meshd.clock import Clock
from meshd.errors import ContextTooLong, InvalidRequest, ProtocolViolation
from meshd.types import ModelCard, ModelId, PeerId, Plan, SamplingParams, SessionId, TokenLogprobs

AnswerToken = tuple[TokenId, TokenLogprobs | None]
_MAX_RENDERER_BYTES = 8 << 20
"""Also the largest record."""


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A request with all defaults resolved, and the tokens so far. It gives the same answer on any peer."""

    session: SessionId
    model: ModelId
    coordinator: PeerId
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


def new_record(
    request: GenerationRequest, card: ModelCard, prompt: tuple[int, ...], coordinator: PeerId, clock: Clock
) -> SessionRecord:
    """Returns: the record of a new request. `prompt`: its token ids.

    Raises: ContextTooLong, InvalidRequest.
    """
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if max(prompt) >= card.spec.vocab or min(prompt) < 0:
        raise InvalidRequest(
            f"the prompt has a token id outside the vocabulary: ids go from 0 to {card.spec.vocab - 1}", param="prompt"
        )
    return SessionRecord(
        session=SessionId(clock.random_bytes(16).hex()),
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


def encode_record(record: SessionRecord) -> bytes:
    """Encode a record for the wire."""
    return msgspec.msgpack.encode(record)


def decode_record(data: bytes | memoryview) -> SessionRecord:
    """Decode a record from the wire. Raises: ProtocolViolation."""
    try:
        return msgspec.msgpack.decode(data, type=SessionRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolViolation(f"a session's record cannot be decoded: {error}") from error
