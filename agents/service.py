"""What the HTTP edge sees of a peer: the coordinator's and the mesh's interface, without the agents' insides."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Protocol

import msgspec

from meshd.errors import MeshdError
from meshd.types import FinishReason, LayerRange, ModelCard, Objective, PeerId, SamplingParams, SessionId


class MeshOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request's `mesh` object."""

    stages: str | None = None
    """`name:0-12,name:12-30`; a peer's name or an unambiguous beginning of its id."""
    peers: tuple[str, ...] | None = None
    """Only these may take part."""
    min_peers: Annotated[int, msgspec.Meta(ge=1)] | None = None
    objective: Objective | None = None
    context: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Tokens to reserve KV for."""
    mirror: bool | None = None
    """Keep a copy of the KV on other peers; None: as the daemon is set (`--mirror`)."""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn, content already joined to text."""

    role: str
    content: str
    name: str | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is asked for. A chat becomes a prompt by the model's own template."""

    model: str
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    template: dict[str, Any] = {}
    """What a chat sets of the variables that the model's template asks for, such as `enable_thinking`."""
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    """None: what the context leaves."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    mesh: MeshOptions = MeshOptions()
    background: bool = False
    """Goes on without a reader. Otherwise the answer is suspended, and its memory freed, when its last reader leaves."""
    store: bool = True
    """Keep the record for a while after the end, so that it can be read again."""
    edge: bytes = b""
    """What the edge needs to show this answer on any peer: opaque to the rooms below, kept with the record."""


class TokenText(msgspec.Struct, frozen=True, kw_only=True):
    """A token's logprob, with text and bytes as OpenAI's `logprobs` show them."""

    token: str
    token_id: int
    logprob: float
    bytes: tuple[int, ...]
    top: tuple["TokenText", ...] = ()


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Text that is now certain: whole characters, no part of a stop string. May be empty if only tokens came."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    """With logprobs asked for: the tokens made since the last delta."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The last event of an answer."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    tpot_s: float


class Generation(Protocol):
    """A running answer."""

    @property
    def session(self) -> SessionId: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def plan_header(self) -> str:
        """`name:0-12,name:12-30`."""
        ...

    @property
    def predicted_tpot_s(self) -> float: ...

    @property
    def edge(self) -> bytes:
        """As the request gave it."""
        ...

    @property
    def status(self) -> str:
        """`queued` (no token yet), `in_progress`, `suspended` (can be resumed), `completed`, `failed` or `cancelled`."""
        ...

    @property
    def error(self) -> MeshdError | None:
        """Why it is suspended or failed."""
        ...

    def events(self) -> AsyncIterator[TextDelta | Finished]:
        """All deltas from the first on, those made already at once, then one Finished.

        May be called several times, also after the end: the sequence is always the same. Raises: PeerFault, Unavailable when the
        answer can't go on now (it can be resumed); Cancelled when it was ended, or taken over by another peer.
        """
        ...

    def so_far(self) -> tuple[tuple[TextDelta, ...], Finished | None]:
        """What `events` would give at once."""
        ...

    async def cancel(self) -> None:
        """Stop the work and free its memory on every peer. Idempotent; fine after the end."""
        ...


class Coordinator(Protocol):
    """Takes requests on this peer."""

    async def generate(self, request: GenerationRequest) -> Generation:
        """Tokenise, plan and open a session.

        Returns once the session is admitted and its plan known. Raises: UnknownModel, InvalidRequest, ContextTooLong,
        Overloaded, NotReady, DoesNotFit, NoPeer, PeerFault. Cancel: nothing stays reserved.
        """
        ...

    async def resume(self, session: SessionId) -> Generation:
        """Go on with an answer here, wherever in the mesh it runs or its record lies; also one that has ended.

        Raises: UnknownSession; as `generate` if it must be planned anew and can't.
        """
        ...

    async def look(self, session: SessionId) -> Generation:
        """An answer as it stands, without taking it over. Raises: UnknownSession."""
        ...

    async def end(self, session: SessionId, *, forget: bool = False) -> None:
        """Cancel an answer wherever it runs; with `forget`, delete its record too. Raises: UnknownSession."""
        ...

    def models(self) -> list[ModelCard]:
        """Those that can answer now."""
        ...

    def readiness(self) -> tuple[bool, float, str]:
        """(ready, progress 0..1, what it waits for): not ready while a model asked for with `--model` still loads."""
        ...


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `meshd plan` and `POST /mesh/v1/plan` ask."""

    model: str
    context: int | None = None
    objective: Objective = Objective.LATENCY
    what_if: tuple[str, ...] = ()
    """Peers that are not here: `+name ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms`."""
    mesh: MeshOptions = MeshOptions()


class PlaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `meshd place` and `POST /mesh/v1/place` ask."""

    model: str
    stages: str | None = None
    min_peers: int | None = None
    objective: Objective | None = None
    context: int | None = None


class PlacementStep(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a placement: one line of `POST /mesh/v1/place`'s event stream."""

    peer: PeerId
    name: str
    layers: LayerRange
    state: str
    progress: float
    message: str = ""


class ClusterService(Protocol):
    """What the monitor and the command line read. Rows are JSON-ready dicts with stable keys."""

    def identity(self) -> dict[str, Any]:
        """This peer: id, name, version, cluster fingerprint, addresses, uptime, notices."""
        ...

    def peers(self) -> list[dict[str, Any]]: ...

    def links(self) -> list[dict[str, Any]]: ...

    def known_models(self) -> list[dict[str, Any]]: ...

    def plans(self) -> list[dict[str, Any]]: ...

    def sessions(self) -> list[dict[str, Any]]: ...

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """`{"type": ..., "at": ..., ...}` as things happen; a slow reader loses the oldest and is told how many."""
        ...

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        """What would be placed where, with predictions and reasons."""
        ...

    def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        """Load layers where the planner, or the request, says; ends when all are active. Raises as `generate` does."""
        ...

    async def unplace(self, model: str) -> int:
        """Bytes freed, over all peers."""
        ...

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        """Have a peer take no new work and move away what it has: `{"peer", "name", "sessions_left"}`.

        Raises: NoPeer, PeerFault.
        """
        ...

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        """Move a session's stages (all, or those at `source`) to another peer: `{"session", "plan", "pause_ms"}`.

        Raises: UnknownSession, NoPeer, InvalidRequest, PeerFault; then it serves on where it was.
        """
        ...

    async def story(self, session: str) -> list[dict[str, Any]]:
        """What happened to a session, in order, told by all peers: `{"at_s", "peer", "name", "what", ...}`.

        Raises: UnknownSession.
        """
        ...

    async def probe_links(self) -> list[dict[str, Any]]:
        """Measure every link of this peer anew; the rows of `links()`."""
        ...
