"""Coordinators that invent their answers and share records as the peers of a cluster do, for tests of the HTTP API alone."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from meshd.agents.service import AnswerSecret, AvailableModel, Finished, GenerationRequest, TextDelta, TokenText
from meshd.agents.session.journal.keys import session_of
from meshd.errors import (
    Cancelled,
    ContextTooLong,
    DoesNotFit,
    InvalidRequest,
    MeshdError,
    NotReady,
    Overloaded,
    PeerLost,
    RemoteFailure,
    UnknownModel,
    UnknownSession,
)
from meshd.types import FinishReason, ModelCard, ModelId, ModelSpec, SessionId

VOCABULARY = (" the", " a", " mesh", " of", " small", " devices", " answers", " as", " one", " große", " 数", " stream", " and")
CONTEXT = 4096
PACE_S = 0.001
"""Seconds for each word of a background answer and of the model `endless`, so that tests can act in the middle of the answer."""

REFUSALS: dict[str, Callable[[], MeshdError | Exception]] = {
    "busy": lambda: Overloaded("the queue is full", retry_after_s=2.5),
    "loading": lambda: NotReady("words is being loaded", progress=0.5, retry_after_s=3),
    "huge": lambda: DoesNotFit("huge does not fit", missing_bytes=10),
    "unforeseen": lambda: RuntimeError("a secret of the inside"),
}
FAULTS: dict[str, Callable[[], MeshdError]] = {
    "breaks": lambda: PeerLost("peer there is lost", hint="send the request again"),
    "fails": lambda: RemoteFailure("peer there could not go on", remote_code="internal_error"),
}
MODELS = frozenset({"words", "file:words", "drained", "prefills", "queued", "endless", *FAULTS})
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
)  # fmt: skip


@dataclass
class Record:
    """The record of an answer, which all peers share."""

    secret: AnswerSecret
    request: GenerationRequest
    prompt_tokens: int
    made: list[TextDelta] = field(default_factory=list)
    finished: Finished | None = None
    status: str = "queued"
    error: MeshdError | None = None
    faults: int = 0
    at: "WordsGeneration | None" = None
    """The answer on the peer that runs it now; None until a peer has begun it."""

    @property
    def session(self) -> SessionId:
        return session_of(self.secret)


NUMERICS = "onnxruntime/int8/512/0123456789abcdef"


class WordsGeneration:
    """An answer on one peer. It draws a word whenever a reader needs one; the words of a background answer are drawn by a task."""

    predicted_ttft_s = 0.25
    predicted_tpot_s = 0.0125
    ignored: tuple[str, ...] = ()
    prompt_end = "assistant:"

    def __init__(self, owner: "WordsCoordinator", record: Record) -> None:
        self._owner, self.record = owner, record
        self.secret, self.session = record.secret, record.session
        self.prompt_tokens, self.renderer = record.prompt_tokens, record.request.renderer
        self._turn = asyncio.Lock()
        self._readers = 0
        self._counted = False
        self._stopped = asyncio.Event()

    @property
    def plan_header(self) -> str:
        return f"{self._owner.name}:0-1,there:1-2"

    @property
    def numerics_header(self) -> str:
        return NUMERICS

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def error(self) -> MeshdError | None:
        return self.record.error

    @property
    def runs(self) -> bool:
        return self.record.status in ("queued", "in_progress")

    def so_far(self) -> tuple[tuple[TextDelta, ...], Finished | None]:
        return tuple(self.record.made), self.record.finished

    def take_over(self) -> None:
        """Run the answer on this peer from now on. Its readers at the previous peer get `Cancelled`."""
        before, self.record.at = self.record.at, self
        if before is not None and before is not self:
            before.count(False)
            before._stopped.set()
        if self.record.status in ("queued", "suspended", "in_progress"):
            self.record.status = "in_progress" if self.record.made else "queued"
            self.record.error = None
            self._stopped.clear()
            self.count(True)

    def count(self, runs: bool) -> None:
        if runs != self._counted:
            self._counted = runs
            self._owner.changed(+1 if runs else -1)

    def _end(self, status: str, error: MeshdError | None = None) -> None:
        self.record.status, self.record.error = status, error
        self.count(False)
        self._stopped.set()

    async def cancel(self) -> None:
        if self.record.at is self and self.record.status in ("queued", "in_progress", "suspended"):
            self._end("cancelled")

    async def events(self) -> AsyncIterator[TextDelta | Finished]:
        record, read = self.record, 0
        self._readers += 1
        try:
            while True:
                if read < len(record.made):
                    yield record.made[read]
                    read += 1
                elif record.finished is not None:
                    yield record.finished
                    return
                else:
                    await self._step(read)
        finally:
            self._readers -= 1
            if not (self._readers or record.request.background) and record.at is self and self.runs:
                self._end("suspended")

    async def _step(self, read: int) -> None:
        """Make word number `read`, unless another reader has made it. Raises: the error that ended the answer on this peer."""
        record = self.record
        async with self._turn:
            if record.at is not self:
                raise Cancelled("another peer has taken the answer over")
            if record.error is not None:
                raise record.error
            if record.status == "cancelled":
                raise Cancelled("the answer was ended")
            if len(record.made) == read and record.finished is None:
                await self._make()

    async def _make(self) -> None:
        record, model = self.record, self.record.request.model
        made = len(record.made)
        if model == "prefills":
            await self._stopped.wait()
        elif made == 3 and model in FAULTS and not record.faults:
            record.faults += model == "breaks"
            self._end("suspended" if model == "breaks" else "failed", FAULTS[model]())
        elif made == 3 and model == "drained":
            self._finish(FinishReason.CANCELLED, "cancelled")
        elif made == self._limit():
            self._finish(FinishReason.LENGTH, "completed")
        else:
            if model == "endless" and not record.request.background:
                await asyncio.sleep(PACE_S)
            elif made % 8 == 0:
                await asyncio.sleep(0)
            if record.at is self and self.runs:
                record.status = "in_progress"
                self._draw()
                self._owner.changed()

    def _limit(self) -> int:
        asked = self.record.request.max_tokens
        return CONTEXT - self.prompt_tokens if asked is None else asked

    def _draw(self) -> None:
        request, made = self.record.request, self.record.made
        # The random numbers depend only on the seed and the position, so that every peer draws the same words.
        picks = random.Random(f"{request.sampling.seed if request.sampling.temperature else 0}:{len(made)}")
        token = picks.randrange(len(VOCABULARY))
        text = "".join(delta.text for delta in made[-64:]) + VOCABULARY[token]
        stopped = any(stop in text for stop in request.stop)
        made.append(TextDelta(text="" if stopped else VOCABULARY[token], tokens=self._shown(token)))
        if stopped:
            self._finish(FinishReason.STOP, "completed")

    def _finish(self, reason: FinishReason, status: str) -> None:
        self.record.finished = Finished(
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.record.made),
            ttft_s=0.01,
            tpot_s=0.001,
        )
        self._end(status)

    def _shown(self, token: int) -> tuple[TokenText, ...]:
        count = self.record.request.sampling.logprobs
        if count is None:
            return ()

        def one(at: int, logprob: float, top: tuple[TokenText, ...] = ()) -> TokenText:
            text = VOCABULARY[at % len(VOCABULARY)]
            return TokenText(token=text, token_id=at, logprob=logprob, bytes=tuple(text.encode()), top=top)

        return (one(token, -1.0, tuple(one(token + rank, -1.0 - rank) for rank in range(count))),)

    async def run(self) -> None:
        """Make all words of a background answer."""
        while self.record.at is self and self.runs:
            await asyncio.sleep(PACE_S)
            async with self._turn:
                if self.record.at is self and self.runs:
                    await self._make()


class WordsCoordinator:
    """Answers with words drawn from the request's seed. Some models fail or wait, to test what clients receive."""

    def __init__(self, name: str = "here", records: dict[SessionId, Record] | None = None) -> None:
        """Coordinators that share `records` are peers of one cluster."""
        self.name = name
        self.records = {} if records is None else records
        self.running = 0
        self.waiting = 0
        self.ready: tuple[bool, float, str] = (True, 1.0, "")
        self.requests: list[GenerationRequest] = []
        self.turn = asyncio.Event()
        """Ends the wait of requests to the model `queued`."""
        self.full = False
        self.available = [AvailableModel(card=CARD, loaded=True)]
        self._conditions: list[tuple[Callable[[WordsCoordinator], bool], asyncio.Event]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def changed(self, by: int = 0) -> None:
        self.running += by
        for holds, event in self._conditions:
            if holds(self):
                event.set()

    async def until(self, holds: Callable[["WordsCoordinator"], bool], within_s: float = 5.0) -> None:
        """Wait until `holds` returns True. Raises: TimeoutError after `within_s`; the default is long enough for a busy machine."""
        event = asyncio.Event()
        self._conditions.append((holds, event))
        self.changed()
        async with asyncio.timeout(within_s):
            await event.wait()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def generate(self, request: GenerationRequest, *, on_wait: Callable[[], None] | None = None) -> WordsGeneration:
        self.requests.append(request)
        await asyncio.sleep(0)
        if refusal := REFUSALS.get(request.model):
            raise refusal()
        if request.model not in MODELS:
            raise UnknownModel(f"no model {request.model!r}", hint="did you mean words?")
        if request.mesh.min_peers is not None and request.mesh.min_peers > 2:
            raise InvalidRequest("`mesh.min_peers` is more than there are", param="mesh.min_peers")
        tokens = self._count(request)
        if tokens + (request.max_tokens or 1) > CONTEXT:
            raise ContextTooLong(f"{tokens} tokens and the answer exceed the context of {CONTEXT}", hint="shorten the prompt")
        if request.model == "queued":
            await self._wait(on_wait)
        record = Record(AnswerSecret(random.randbytes(16).hex()), request, tokens)
        self.records[record.session] = record
        return self._continue(record)

    async def resume(self, secret: AnswerSecret) -> WordsGeneration:
        await asyncio.sleep(0)
        return self._continue(self._find(session_of(secret)))

    async def look(self, secret: AnswerSecret) -> WordsGeneration:
        await asyncio.sleep(0)
        return WordsGeneration(self, self._find(session_of(secret)))

    async def end(self, session: SessionId, *, forget: bool = False) -> None:
        record = self._find(session)
        if record.at is not None:
            await record.at.cancel()
        if forget:
            del self.records[session]

    def _continue(self, record: Record) -> WordsGeneration:
        mine = record.at if record.at is not None and record.at._owner is self else WordsGeneration(self, record)
        mine.take_over()
        mine.ignored = tuple(
            f"messages[{index}].name"
            for index, turn in enumerate(record.request.prompt)
            if not isinstance(turn, int | str) and turn.name is not None
        )
        if record.request.background:
            task = asyncio.create_task(mine.run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return mine

    def _find(self, session: SessionId) -> Record:
        if session not in self.records:
            raise UnknownSession(f"nobody knows session {session}")
        return self.records[session]

    async def _wait(self, on_wait: Callable[[], None] | None) -> None:
        """Wait in the queue until `turn` is set. Raises: Overloaded if `full` is set then."""
        self.waiting += 1
        self.changed()
        if on_wait is not None:
            on_wait()
        try:
            await self.turn.wait()
            if self.full:
                raise Overloaded("no other request ended within 30 s", retry_after_s=2.5)
        finally:
            self.waiting -= 1
            self.changed()

    def _count(self, request: GenerationRequest) -> int:
        match request.prompt:
            case str(text):
                return len(text.split())
            case turns:
                return sum(1 if isinstance(turn, int) else 2 + len(turn.content.split()) for turn in turns)

    def card(self, model: str) -> ModelCard | None:
        return next((one.card for one in self.available if model in (one.card.name, one.card.ref, one.card.id)), None)

    async def models(self) -> list[AvailableModel]:
        return self.available

    def readiness(self) -> tuple[bool, float, str]:
        return self.ready
