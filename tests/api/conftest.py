"""A server over a coordinator that makes up its words: the HTTP edge is real, the model is not."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from openai import AsyncOpenAI

from meshd.agents.service import (
    Finished,
    GenerationRequest,
    PlacementStep,
    PlaceRequest,
    PlanRequest,
    TextDelta,
    TokenText,
)
from meshd.api.app import Server, create_app, serve
from meshd.api.services import Limits
from meshd.clock import SystemClock
from meshd.errors import (
    ContextTooLong,
    DoesNotFit,
    InvalidRequest,
    MeshdError,
    NotReady,
    Overloaded,
    PeerLost,
    UnknownModel,
)
from meshd.telemetry import Telemetry
from meshd.types import FinishReason, LayerRange, ModelCard, ModelId, ModelSpec, PeerId, SessionId

VOCABULARY = (" the", " a", " mesh", " of", " small", " devices", " answers", " as", " one", " große", " 数", " stream", " and")
CONTEXT = 4096

REFUSALS: dict[str, Callable[[], MeshdError | Exception]] = {
    "busy": lambda: Overloaded("the queue is full", retry_after_s=2.5),
    "loading": lambda: NotReady("words is being loaded", progress=0.5, retry_after_s=3),
    "huge": lambda: DoesNotFit("huge does not fit", missing_bytes=10),
    "unforeseen": lambda: RuntimeError("a secret of the inside"),
}
CARD = ModelCard(
    id=ModelId("0" * 32),
    name="words",
    ref="file:words",
    quantisation="F32",
    spec=ModelSpec(
        architecture="words", layers=2, hidden=8, heads=1, kv_heads=1, head_dim=8, ffn=8, vocab=len(VOCABULARY),
        context_length=CONTEXT, rope_theta=1e4, norm_eps=1e-5, tied_head=True,
    ),
    layer_bytes=(1, 1), embedding_bytes=1, head_bytes=1, layer_parameters=(1, 1), head_parameters=1, end_of_sequence=(0,),
    created=1_700_000_000,
)


class WordsGeneration:
    """A running answer; the coordinator counts it until it is cancelled or read to its end and cancelled."""

    plan_header = "here:0-1,there:1-2"
    predicted_tpot_s = 0.0125

    def __init__(self, owner: "WordsCoordinator", request: GenerationRequest, prompt_tokens: int) -> None:
        self._owner, self._request = owner, request
        self.session = SessionId(random.randbytes(16).hex())
        self.prompt_tokens = prompt_tokens
        owner.changed(+1)
        self._open = True

    async def cancel(self) -> None:
        if self._open:
            self._open = False
            self._owner.changed(-1)

    async def events(self) -> AsyncIterator[TextDelta | Finished]:
        request = self._request
        if request.model == "prefills":
            await asyncio.Event().wait()
        limit = CONTEXT - self.prompt_tokens if request.max_tokens is None else request.max_tokens
        sampling = request.sampling
        picks = random.Random(sampling.seed if sampling.temperature else 0)
        text = ""
        for made in range(limit):
            if request.model == "breaks" and made == 3:
                raise PeerLost("peer there is lost", hint="send the request again")
            if request.model == "drained" and made == 3:
                yield self._finished(FinishReason.CANCELLED, made)
                return
            if request.model == "endless" or made % 8 == 0:
                await asyncio.sleep(0)
            token = picks.randrange(len(VOCABULARY))
            text += VOCABULARY[token]
            stopped = any(stop in text for stop in request.stop)
            yield TextDelta(text="" if stopped else VOCABULARY[token], tokens=self._shown(token))
            if stopped:
                yield self._finished(FinishReason.STOP, made + 1)
                return
        yield self._finished(FinishReason.LENGTH, limit)

    def _finished(self, reason: FinishReason, tokens: int) -> Finished:
        return Finished(
            reason=reason, prompt_tokens=self.prompt_tokens, completion_tokens=tokens, ttft_s=0.01, tpot_s=0.001
        )

    def _shown(self, token: int) -> tuple[TokenText, ...]:
        count = self._request.sampling.logprobs
        if count is None:
            return ()
        def one(at: int, logprob: float, top: tuple[TokenText, ...] = ()) -> TokenText:
            text = VOCABULARY[at % len(VOCABULARY)]
            return TokenText(token=text, token_id=at, logprob=logprob, bytes=tuple(text.encode()), top=top)
        return (one(token, -1.0, tuple(one(token + rank, -1.0 - rank) for rank in range(count))),)


class WordsCoordinator:
    """Answers with words drawn by the request's seed. Some model names make it fail or wait, to see what clients are told."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting = 0
        self.ready: tuple[bool, float, str] = (True, 1.0, "")
        self.requests: list[GenerationRequest] = []
        self._condition: list[tuple[Callable[[WordsCoordinator], bool], asyncio.Event]] = []

    def changed(self, by: int = 0) -> None:
        self.running += by
        for holds, event in self._condition:
            if holds(self):
                event.set()

    async def until(self, holds: Callable[["WordsCoordinator"], bool], within_s: float = 1.0) -> None:
        """Raises: TimeoutError."""
        event = asyncio.Event()
        self._condition.append((holds, event))
        self.changed()
        async with asyncio.timeout(within_s):
            await event.wait()

    async def generate(self, request: GenerationRequest) -> WordsGeneration:
        self.requests.append(request)
        await asyncio.sleep(0)
        if refusal := REFUSALS.get(request.model):
            raise refusal()
        if request.model not in ("words", "file:words", "breaks", "drained", "prefills", "queued", "endless"):
            raise UnknownModel(f"no model {request.model!r}", hint="did you mean words?")
        if request.mesh.min_peers is not None and request.mesh.min_peers > 2:
            raise InvalidRequest("`mesh.min_peers` is more than there are", param="mesh.min_peers")
        tokens = self._count(request)
        if tokens + (request.max_tokens or 1) > CONTEXT:
            raise ContextTooLong(f"{tokens} tokens and the answer exceed the context of {CONTEXT}", hint="shorten the prompt")
        if request.model == "queued":
            self.waiting += 1
            self.changed()
            try:
                await asyncio.Event().wait()
            finally:
                self.waiting -= 1
                self.changed()
        return WordsGeneration(self, request, tokens)

    def _count(self, request: GenerationRequest) -> int:
        match request.prompt:
            case str(text):
                return len(text.split())
            case turns:
                return sum(1 if isinstance(turn, int) else 2 + len(turn.content.split()) for turn in turns)

    def models(self) -> list[ModelCard]:
        return [CARD]

    def readiness(self) -> tuple[bool, float, str]:
        return self.ready


class WordsMesh:
    """A mesh of one peer that does as it is told."""

    def identity(self) -> dict[str, Any]:
        return {"id": "p" * 52, "name": "here", "notices": []}

    def peers(self) -> list[dict[str, Any]]:
        return [{"id": "p" * 52, "name": "here", "state": "alive"}]

    def links(self) -> list[dict[str, Any]]:
        return []

    def known_models(self) -> list[dict[str, Any]]:
        return [{"name": "words"}]

    def plans(self) -> list[dict[str, Any]]:
        return []

    def sessions(self) -> list[dict[str, Any]]:
        return []

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        yield {"type": "peer_joined", "at": 1.0}
        await asyncio.Event().wait()

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        if request.model != "words":
            raise UnknownModel(f"no model {request.model!r}")
        return {"model": request.model, "objective": request.objective, "stages": []}

    async def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        if request.model == "missing":
            raise UnknownModel("no model 'missing'")
        layers = LayerRange(0, 2)
        yield PlacementStep(peer=PeerId("p" * 52), name="here", layers=layers, state="loading", progress=0.5)
        if request.model == "breaks":
            raise PeerLost("peer there is lost")
        yield PlacementStep(peer=PeerId("p" * 52), name="here", layers=layers, state="active", progress=1.0)

    async def unplace(self, model: str) -> int:
        return 1024

    async def probe_links(self) -> list[dict[str, Any]]:
        return [{"peer": "q" * 52, "rtt_s": 0.001}]


@pytest.fixture
def coordinator() -> WordsCoordinator:
    return WordsCoordinator()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def api_key() -> str | None:
    return None


@pytest.fixture
async def server(
    coordinator: WordsCoordinator, telemetry: Telemetry, limits: Limits, api_key: str | None
) -> AsyncIterator[Server]:
    app = create_app(coordinator, WordsMesh(), telemetry, api_key=api_key, clock=SystemClock(), limits=limits)
    server = await serve(app, "127.0.0.1", 0)
    yield server
    await server.aclose()


@pytest.fixture
def base_url(server: Server) -> str:
    """Where a daemon's HTTP edge listens: the tests of real clients ask for no more than this, `model` and `api_key`."""
    return server.url


@pytest.fixture
def model() -> str:
    """A model that the daemon at `base_url` can answer with."""
    return "words"


@pytest.fixture
async def openai_client(base_url: str, api_key: str | None) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=api_key or "none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url, timeout=aiohttp.ClientTimeout(10)) as session:
        yield session


@pytest.fixture
def events_of() -> Callable[[aiohttp.ClientResponse], Any]:
    """Reads a whole event stream: the data of each event, decoded, and `[DONE]` as it is."""

    async def read(response: aiohttp.ClientResponse) -> list[Any]:
        lines = (await response.text()).split("\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [item if item == "[DONE]" else msgspec.json.decode(item) for item in data]

    return read
