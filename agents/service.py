"""The interfaces of a peer that the HTTP API uses: `Coordinator` for answers, `ClusterService` for the cluster."""

from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, NewType, Protocol

import msgspec

from meshd.bounds import MAX_PEERS, MAX_TOKENS, Label, at_most
from meshd.errors import MeshdError
from meshd.models.store.progress import PullProgress
from meshd.types import FinishReason, LayerRange, ModelCard, Objective, PeerId, SamplingParams, SessionId

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


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request of `meshd plan` and `POST /mesh/v1/plan`."""

    model: str
    context: ContextTokens | None = None
    objective: Objective = Objective.LATENCY
    what_if: tuple[str, ...] = ()
    """Hypothetical peers to add: `+name ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms`."""
    mesh: MeshOptions = MeshOptions()


class PlaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request of `meshd place` and `POST /mesh/v1/place`."""

    model: str
    stages: str | None = None
    min_peers: PeerCount | None = None
    objective: Objective | None = None
    context: ContextTokens | None = None


class PlacementStep(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a placement: one event in the stream of `POST /mesh/v1/place`."""

    peer: PeerId
    name: str
    layers: LayerRange
    state: str
    progress: float
    message: str = ""


InviteState = Literal["waiting", "joined", "sent", "expired", "tries", "closed", "failed"]
"""`sent`: the device has the join code, but its connection broke before it said that it stored it. `tries`: three wrong tries."""


class InviteStep(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an invite: one event in the stream of `POST /mesh/v1/invites`."""

    state: InviteState
    number: int
    """The code's first part, which is not secret."""
    code: str = ""
    """Only in the first event."""
    left_s: float
    tries_left: int
    joined: str = ""
    """Name of the device that has joined."""
    addresses: tuple[str, ...] = ()
    """Where the invite listens, for a joiner that multicast does not reach."""


class CheckStatus(StrEnum):
    """The outcome of one check of `meshd doctor`."""

    OK = "ok"
    WARNING = "warning"
    """Something that may become a fault, or costs speed."""
    WRONG = "wrong"
    """A fault: something does not work."""
    UNCHECKED = "unchecked"
    """It could not be found out. Counts as a warning."""


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found about one subject."""

    check: str
    """Stable id of the check, such as `link-port`."""
    status: CheckStatus
    found: str
    """What is so, or what is wrong and why."""
    mend: str = ""
    """What to type, or to do."""
    subject: str = ""
    """What was checked, where a check has several subjects: a peer, a folder, a backend."""


class CheckStep(msgspec.Struct, frozen=True, kw_only=True):
    """One check is done: one event in the stream of `POST /mesh/v1/doctor`."""

    check: str
    done: int
    """Number of checks that are done."""
    total: int
    results: tuple[CheckResult, ...]


class DoctorRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request of `meshd doctor` and `POST /mesh/v1/doctor`."""

    model: str | None = None
    """A model to check the needs of."""


class EventLine(NamedTuple):
    """One event for a reader of `GET /mesh/v1/events`."""

    number: int | None
    """With which the reader can resume. None: a row that the reader is given besides, because it has none."""
    kind: str
    line: bytes
    """The event as a JSON object. `agents/observe/events.py` has all kinds."""


class ClusterService(Protocol):
    """The interface for the monitor and the command line. Rows are JSON-ready dicts with stable keys."""

    def identity(self) -> dict[str, Any]:
        """Describe this peer: id, name, version, cluster fingerprint, addresses, uptime, notices."""
        ...

    def peers(self) -> list[dict[str, Any]]: ...

    def links(self) -> list[dict[str, Any]]: ...

    async def known_models(self) -> list[dict[str, Any]]: ...

    def plans(self) -> list[dict[str, Any]]: ...

    def sessions(self) -> list[dict[str, Any]]: ...

    def events(self, after: int | None) -> AsyncIterator[EventLine]:
        """Yield the rows of all listings and then all events, or only the events after number `after`.

        A reader that is too slow or resumes too late gets a `lost` event, then all rows again, and the oldest events that are kept.
        """
        ...

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        """Compute a plan without loading any layers. Returns: the plan with predictions and reasons."""
        ...

    def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        """Load layers on the peers that the planner or the request chooses, and yield progress until all layers are active.

        Raises: MeshdError, for example UnknownModel or DoesNotFit.
        """
        ...

    async def unplace(self, model: str) -> int:
        """Unload a model on all peers. Returns: bytes freed."""
        ...

    def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """Fetch a model from its source to this peer's disk, and yield progress until it is there.

        Raises: MeshdError, for example UnknownModel, DownloadError, or Overloaded if too many pulls run.
        Cancel: the pull stops; the next one resumes it.
        """
        ...

    async def remove_model(self, model: str) -> int:
        """Remove a model from this peer's disk. Returns: bytes freed. Raises: UnknownModel, StorageError."""
        ...

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        """Have a peer take no new work, and wait until its sessions have ended or moved away. `undo`: have it take work again.

        Returns: `{"peer", "name", "sessions_left"}`.
        Raises: NoPeer, InvalidRequest, PeerFault.
        """
        ...

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        """Move a session's stages (all, or those at `source`) to `target`. If that fails, the session continues where it was.

        Returns: `{"session", "plan", "pause_ms"}`.
        Raises: UnknownSession, NoPeer, InvalidRequest, PeerFault.
        """
        ...

    async def cancel(self, session: str) -> str:
        """Cancel a session wherever it runs. Returns: its whole id. Raises: UnknownSession, InvalidRequest."""
        ...

    async def story(self, session: str) -> list[dict[str, Any]]:
        """Collect what all peers noted about a session, sorted by time.

        Returns: lines `{"at_s", "peer", "name", "what", ...}`.
        Raises: UnknownSession.
        """
        ...

    async def trace(self, session: str) -> bytes:
        """Collect from all peers when they computed the steps of a session.

        Returns: a JSON document of Chrome's trace format, with all times in this peer's clock.
        Raises: UnknownSession.
        """
        ...

    def reload(self) -> dict[str, Any]:
        """Read the settings again, and apply those that can change while the daemon runs.

        Returns: `{"applied", "needs_restart"}`, lists of the names of changed settings.
        Raises: ConfigError; nothing has changed then.
        """
        ...

    async def probe_links(self) -> list[dict[str, Any]]:
        """Measure every link of this peer again. Returns: the rows of `links()`."""
        ...

    def invite(self, minutes: float) -> AsyncIterator[InviteStep]:
        """Open an invite, and yield its state until it has ended. Leaving the iterator closes it.

        Raises: InvalidRequest if one is open already; StorageError.
        """
        ...

    def invites(self) -> list[InviteStep]:
        """Returns: the open invite without its code, if there is one."""
        ...

    def close_invite(self) -> bool:
        """Close the open invite. Returns: False if there is none."""
        ...

    def doctor(self, request: DoctorRequest) -> AsyncIterator[CheckStep]:
        """Look for faults of this device, its set-up and its connections with other peers.

        Raises: Overloaded if such a search runs here already.
        """
        ...

    def cluster_key(self) -> dict[str, Any]:
        """Describe the cluster's key, without it, and the peers that are known."""
        ...

    async def rotate(self, chain: bytes, secret: bytes) -> dict[str, Any]:
        """Take in a rotation that the owner has signed, with its cluster key. Returns: as `cluster_key`.

        Raises: InvalidRequest if it is not signed by the owner, or does not follow the newest one.
        """
        ...

    async def give_owner_key(self, peer: str, seed: bytes) -> dict[str, Any]:
        """Give a peer a copy of the owner key, which the caller must have.

        Returns: `{"peer", "name"}`.
        Raises: InvalidRequest, NoPeer, PeerFault.
        """
        ...
