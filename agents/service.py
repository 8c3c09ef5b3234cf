"""The interface of a peer that the HTTP API uses for answers: `Coordinator`, its requests, and what an answer consists of."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, NewType, Protocol

import msgspec

from meshd.bounds import MAX_PEERS, MAX_TOKENS, Label, at_most
from meshd.errors import MeshdError
from meshd.types import FinishReason, ModelCard, Objective, SamplingParams, SessionId

AnswerSecret = NewType("AnswerSecret", str)
"""The random part of an answer's id, 32 hexadecimal digits. Whoever has it may read and continue the answer at any peer."""
NO_SECRET = AnswerSecret("")
"""On a peer that no client has sent the answer's id to."""
_MAX_STAGES_TEXT = 64 * MAX_PEERS
"""Room for one stage of each peer, with the peer's id."""
ContextTokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
PeerCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_PEERS)]


class MeshOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options for a request's plan: the JSON object `mesh`."""

    stages: Annotated[str, at_most(_MAX_STAGES_TEXT)] | None = None
    """Which peer runs which layers, as `name:0-12,name:12-30`. A name may be an unambiguous beginning of the peer's id."""
    peers: Annotated[tuple[Label, ...], at_most(MAX_PEERS)] | None = None
    """Names, or beginnings of ids, of the peers that may take part; None: all peers."""
    min_peers: PeerCount | None = None
    objective: Objective | None = None
    context: ContextTokens | None = None
    """Maximum number of tokens of prompt and answer together; None: the model's context length."""
    mirror: bool | None = None
    """Whether to keep a copy of the KV on other peers; None: as set by `--mirror`."""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a chat. The parts of its content are joined to one text."""

    role: str
    content: str
    name: str | None = None
    reasoning: str | None = None
    """What the assistant thought before this message. The chat template decides whether the model sees it."""

    def for_template(self) -> dict[str, Any]:
        """Return the message with the names that chat templates use. What was not given is absent."""
        given = {"role": self.role, "content": self.content, "name": self.name, "reasoning_content": self.reasoning}
        return {name: value for name, value in given.items() if value is not None}


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for one answer. The model's own template turns a chat into a prompt."""

    model: str
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    template: dict[str, Any] = {}
    """Variables for the model's chat template, such as `enable_thinking`."""
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    """Maximum number of answer tokens; None: as many as fit into the context."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    mesh: MeshOptions = MeshOptions()
    background: bool = False
    """Whether to continue without a reader. If false, the answer is suspended and its memory freed when its last reader leaves."""
    store: bool = True
    """Whether to keep the answer's record for 10 minutes after its end, so that the answer can be read again."""
    renderer: bytes = b""
    """The API's encoded state, with which the API on any peer can format this answer. The agents keep it but don't decode it."""


class TokenText(msgspec.Struct, frozen=True, kw_only=True):
    """A token's logprob, with text and bytes as OpenAI's `logprobs` show them."""

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...]
    top: tuple["TokenText", ...] = ()


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next piece of an answer: text that cannot change any more. The text is empty if the delta has only tokens."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    """The tokens since the last delta, if logprobs were requested."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The last event of an answer."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    tpot_s: float


class AvailableModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a request would be answered with."""

    card: ModelCard
    loaded: bool
    """Whether live peers hold all layers. If not, the first request waits until they are loaded."""


class Generation(Protocol):
    """An answer, which may be running, suspended or ended."""

    @property
    def secret(self) -> AnswerSecret:
        """The secret part of the answer's id. `NO_SECRET` on a peer that no client has asked for the answer yet."""
        ...

    @property
    def session(self) -> SessionId: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def plan_header(self) -> str:
        """The present plan as `name:0-12,name:12-30`; empty while there is none."""
        ...

    @property
    def numerics_header(self) -> str:
        """The numerics ids of the present plan's peers, each once, separated by commas. Empty while there is none."""
        ...

    @property
    def predicted_ttft_s(self) -> float:
        """Seconds from the answer's admission to its first token, as predicted by its plan; 0 while there is none."""
        ...

    @property
    def predicted_tpot_s(self) -> float: ...

    @property
    def prompt_end(self) -> str:
        """The text of the prompt's last tokens. Chat templates of some models end with the beginning of a thought."""
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields of the request that the model's chat template does not use, such as `messages[0].name`."""
        ...

    @property
    def renderer(self) -> bytes:
        """See `GenerationRequest.renderer`."""
        ...

    @property
    def status(self) -> str:
        """`queued` (no token yet), `in_progress`, `suspended` (can be resumed), `completed`, `failed` or `cancelled`."""
        ...

    @property
    def error(self) -> MeshdError | None:
        """Returns: the reason if the answer is suspended or has failed."""
        ...

    def events(self) -> AsyncIterator[TextDelta | Finished]:
        """Yield all deltas from the first one, then one Finished. Deltas that exist already are yielded without waiting.

        May be called several times, also after the end: the sequence is always the same.

        Raises: the error for which the answer was suspended or has failed; Cancelled if it was cancelled or taken over by another
        peer.
        """
        ...

    def so_far(self) -> tuple[tuple[TextDelta, ...], Finished | None]:
        """Returns: (all deltas so far, the last event if the answer has finished)."""
        ...

    async def cancel(self) -> None:
        """Stop the work and free its memory on every peer. Idempotent, and allowed after the end."""
        ...


class Coordinator(Protocol):
    """Starts, resumes and ends answers for the clients of this peer."""

    async def generate(self, request: GenerationRequest, *, on_wait: Callable[[], None] | None = None) -> Generation:
        """Tokenise, plan and open a session. `on_wait` is called if the request waits until another answer ends.

        Returns: the running answer, once all stages of its first plan are open.
        Raises: UnknownModel, InvalidRequest, ContextTooLong, Overloaded, NotReady, DoesNotFit, NoPeer, PeerFault.
        Cancel: all reservations are released.
        """
        ...

    async def resume(self, secret: AnswerSecret) -> Generation:
        """Continue an answer on this peer. Take it over first if it runs, or its record is kept, on another peer.

        An answer that has ended is not continued, but can be read again.

        Raises: UnknownSession, UnknownModel; Overloaded if this peer cannot run one more answer.
        """
        ...

    async def look(self, secret: AnswerSecret) -> Generation:
        """Find an answer without taking it over. Returns: its present state. Raises: UnknownSession, UnknownModel."""
        ...

    async def end(self, session: SessionId, *, forget: bool = False) -> None:
        """Cancel an answer wherever it runs; with `forget`, delete its record too. Raises: UnknownSession."""
        ...

    def card(self, model: str) -> ModelCard | None:
        """Find a known model by its name, reference or id. Returns: None if no live peer has it."""
        ...

    async def models(self) -> list[AvailableModel]:
        """Returns: the models that a request would be answered with, whether they are loaded or would be loaded for it."""
        ...

    def readiness(self) -> tuple[bool, float, str]:
        """Returns: (ready, progress 0 to 1, what the peer waits for). A peer is not ready while a model of `--model` loads."""
        ...
