"""What a session is made of: enough to go on with it on any peer. Kept by its coordinator, and by the deputy that takes over."""

import msgspec

from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.clock import Clock
from meshd.errors import ContextTooLong, InvalidRequest, ProtocolViolation
from meshd.types import ModelCard, ModelId, PeerId, Plan, SamplingParams, SessionId, TokenLogprobs

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


def new_record(
    request: GenerationRequest, card: ModelCard, prompt: tuple[int, ...], coordinator: PeerId, clock: Clock
) -> SessionRecord:
    """Returns: the record that a request begins with. `prompt`: its token ids.

    Raises: ContextTooLong, InvalidRequest.
    """
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if max(prompt) >= card.spec.vocab or min(prompt) < 0:
        raise InvalidRequest(f"token ids go from 0 to {card.spec.vocab - 1}", param="prompt")
    return SessionRecord(
        session=SessionId(clock.random_bytes(16).hex()),
        model=card.id,
        coordinator=coordinator,
        epoch=0,
        prompt=prompt,
        max_tokens=_max_tokens(request, card, len(prompt)),
        sampling=request.sampling,
        ignore_eos=request.ignore_eos,
        stop=request.stop,
        mesh=request.mesh,
        background=request.background,
        store=request.store,
        edge=request.edge,
        created=clock.wall(),
    )


def _max_tokens(request: GenerationRequest, card: ModelCard, prompt_tokens: int) -> int:
    """Returns: the answer's limit, by default what the context leaves. Raises: ContextTooLong, InvalidRequest."""
    context = request.mesh.context or card.spec.context_length
    if context > card.spec.context_length:
        raise InvalidRequest(f"the model's context is {card.spec.context_length} tokens, not {context}", param="mesh.context")
    left = context - prompt_tokens
    wanted = request.max_tokens if request.max_tokens is not None else left
    if left < 1 or wanted > left:
        asked = f"{prompt_tokens} in the prompt" + (f" and {wanted} for the answer" if request.max_tokens is not None else "")
        raise ContextTooLong(
            f"this model's context is {context} tokens, and {asked} are more", hint="shorten the prompt or max_tokens"
        )
    return wanted


def encode_record(record: SessionRecord) -> bytes:
    """For the wire."""
    return msgspec.msgpack.encode(record)


def decode_record(data: bytes | memoryview) -> SessionRecord:
    """Raises: ProtocolViolation."""
    try:
        return msgspec.msgpack.decode(data, type=SessionRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolViolation(f"a session's record arrived torn: {error}") from error
