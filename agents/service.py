"""What the HTTP edge sees of a peer: the coordinator's and the mesh's interface, without the agents' insides."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Protocol

import msgspec

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


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn, content already joined to text."""

    role: str
    content: str
    name: str | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is asked for. A chat becomes a prompt by the model's own template."""

    model: str
    prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    """None: what the context leaves."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    mesh: MeshOptions = MeshOptions()


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

    def events(self) -> AsyncIterator[TextDelta | Finished]:
        """Deltas, then one Finished. Raises: PeerFault, Unavailable when the answer can't go on."""
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


class Mesh(Protocol):
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

    async def probe_links(self) -> list[dict[str, Any]]:
        """Measure every link of this peer anew; the rows of `links()`."""
        ...
