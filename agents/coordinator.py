"""A request on the peer that took it: tokenise, plan, admit, open, and watch until its end."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.admission import Admission
from meshd.agents.answer import Answer, Work
from meshd.agents.library import Library, ModelText
from meshd.agents.links import Links
from meshd.agents.routing import Router
from meshd.agents.service import GenerationRequest
from meshd.agents.text import Assembler, StopMatcher
from meshd.clock import Clock
from meshd.errors import ContextTooLong, InvalidRequest, NoPeer, OutOfMemory, Overloaded, RemoteFailure
from meshd.protocol.messages import Closed, Error, Failed, Token
from meshd.telemetry import Telemetry
from meshd.types import ModelCard, PeerId, Plan, SessionId

log = getLogger(__name__)

_TICK_S = 0.25
_ROOM_WAIT_S = 30.0
"""How long a request waits for KV room on its stages before it is told to come back."""
_ROOM_RETRY_S = 0.25
_PASSING = frozenset({OutOfMemory.code, NoPeer.code})
"""What a stage refuses to open with when it changed since the plan was made: another session took the room, a load gave way."""


@dataclass(slots=True)
class Coordinator:
    """Implements `service.Coordinator` (with `models` and `readiness` from the library and the router)."""

    me: PeerId
    links: Links
    library: Library
    router: Router
    admission: Admission
    clock: Clock
    telemetry: Telemetry
    names: Callable[[PeerId], str]
    readiness_of: Callable[[], tuple[bool, float, str]]
    answers: dict[SessionId, Answer] = field(default_factory=dict)

    def register(self) -> None:
        """Take the messages that stages send to their coordinator. TOKEN goes to the first stage too: the daemon shares it out."""
        self.links.register(Failed, self._on_failed)
        self.links.register(Closed, lambda sender, message, payload: None)

    async def run(self) -> None:
        """Renew leases and watch deadlines. Cancel: every session is closed on its stages."""
        try:
            while True:
                await self.clock.sleep(_TICK_S)
                now = self.clock.monotonic()
                for answer in list(self.answers.values()):
                    answer.tick(now)
        finally:
            for answer in list(self.answers.values()):
                await answer.cancel()

    def models(self) -> list[ModelCard]:
        """See `service.Coordinator.models`."""
        return self.router.answerable()

    def readiness(self) -> tuple[bool, float, str]:
        """See `service.Coordinator.readiness`."""
        return self.readiness_of()

    async def generate(self, request: GenerationRequest) -> Answer:
        """See `service.Coordinator.generate`."""
        card = self.library.find(request.model)
        text = await self.library.text(card)
        # On another thread: a long prompt, or a template that loops, must not hold up the heartbeats.
        prompt = await asyncio.to_thread(text.tokens_of, request.prompt)
        work = self._work(request, card, prompt)
        asked = self.clock.monotonic()
        await self.admission.enter()
        self.telemetry.queue_wait(self.clock.monotonic() - asked)
        entered = self.clock.monotonic()
        try:
            return await self._start(request, card, text, work, entered)
        except BaseException:
            self.admission.leave(0.0)
            raise

    async def _start(self, request: GenerationRequest, card: ModelCard, text: ModelText, work: Work, entered: float) -> Answer:
        """Plan and open; wait for room if the stages are full of others' sessions."""
        until = entered + _ROOM_WAIT_S
        while True:
            plan = await self._plan(request, card, work, until)
            answer = self._answer(request, text, work)
            self.answers[answer.session] = answer
            try:
                await answer.open(plan)
            except RemoteFailure as error:
                if error.remote_code not in _PASSING:
                    raise
                if self.clock.monotonic() > until:
                    raise Overloaded(f"no room for this request's context: {error.message}", retry_after_s=5.0) from error
                await self.clock.sleep(_ROOM_RETRY_S)
            else:
                answer.on_end = lambda ended: self._ended(ended, entered)
                if answer.ended:
                    self._ended(answer, entered)
                self._log_start(answer, card, plan)
                return answer
            finally:
                if answer.ended:
                    self.answers.pop(answer.session, None)

    async def _plan(self, request: GenerationRequest, card: ModelCard, work: Work, until: float) -> Plan:
        """A plan, as soon as other answers leave room for its KV. Raises: as `Router.plan_for`."""
        while True:
            try:
                return await self.router.plan_for(card, request.mesh, prompt_tokens=len(work.prompt), max_tokens=work.max_tokens)
            except Overloaded:
                if self.clock.monotonic() > until:
                    raise
                await self.clock.sleep(_ROOM_RETRY_S)

    def _answer(self, request: GenerationRequest, text: ModelText, work: Work) -> Answer:
        return Answer(
            session=SessionId(self.clock.random_bytes(16).hex()),
            work=work,
            links=self.links,
            clock=self.clock,
            me=self.me,
            names=self.names,
            assembler=Assembler(
                decoder=text.tokenizer.stream(),
                vocabulary=text.tokenizer,
                stops=StopMatcher(request.stop),
                with_logprobs=request.sampling.logprobs is not None,
            ),
            on_end=lambda ended: None,  # until it is open, `_start` gives the ticket back itself
        )

    def _work(self, request: GenerationRequest, card: ModelCard, prompt: tuple[int, ...]) -> Work:
        """The prompt's tokens and how many may follow. Raises: ContextTooLong, InvalidRequest."""
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if max(prompt) >= card.spec.vocab or min(prompt) < 0:
            raise InvalidRequest(f"token ids go from 0 to {card.spec.vocab - 1}", param="prompt")
        context = request.mesh.context or card.spec.context_length
        if context > card.spec.context_length:
            raise InvalidRequest(f"the model's context is {card.spec.context_length} tokens, not {context}", param="mesh.context")
        room = context - len(prompt)
        wanted = request.max_tokens if request.max_tokens is not None else room
        if room < 1 or wanted > room:
            asked = f"{len(prompt)} in the prompt" + (f" and {wanted} for the answer" if request.max_tokens is not None else "")
            raise ContextTooLong(
                f"this model's context is {context} tokens, and {asked} are more", hint="shorten the prompt or max_tokens"
            )
        return Work(prompt, wanted, request.sampling, request.ignore_eos)

    # What the network tells

    def on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """The last stage's pick, for the client."""
        answer = self.answers.get(message.session)
        if answer is not None and answer.plan is not None and answer.plan.peers[-1] == sender:
            answer.on_token(message)

    def _on_failed(self, sender: PeerId, message: Failed, payload: memoryview) -> None:
        answer = self.answers.get(message.session)
        if answer is not None and answer.plan is not None and sender in answer.plan.peers:
            answer.on_failed(message)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """A stage's peer could not take what this coordinator sent it."""
        answer = self.answers.get(message.session) if message.session is not None else None
        if answer is not None and answer.plan is not None and sender in answer.plan.peers:
            answer.on_error(message)

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """A link is down: sessions that ran through it can't go on."""
        for answer in list(self.answers.values()):
            answer.on_peer_gone(peer, reason)

    def _ended(self, answer: Answer, entered: float) -> None:
        if self.answers.pop(answer.session, None) is None:
            return
        self.admission.leave(self.clock.monotonic() - entered)
        outcome = answer.machine.finish.value if answer.machine.finish else "error"
        tokens = len(answer.machine.tokens)
        self._count(answer, tokens)
        log.info(
            "session %s ended: %s, %d tokens, ttft %.0f ms, tpot %.1f ms (predicted %.1f)",
            answer.session,
            outcome,
            tokens,
            1000 * answer.ttft_s,
            1000 * answer.measured_tpot_s,
            1000 * answer.predicted_tpot_s,
        )

    def _count(self, answer: Answer, tokens: int) -> None:
        self.telemetry.sessions_active(len(self.answers))
        self.telemetry.tokens(prompt=answer.prompt_tokens, completion=tokens)
        if answer.ttft_s and answer.plan is not None:
            self.telemetry.ttft(answer.ttft_s)
            self.telemetry.prediction("ttft", answer.plan.predicted_ttft_s, answer.ttft_s)
        if answer.measured_tpot_s:
            self.telemetry.tpot(answer.measured_tpot_s)
            self.telemetry.prediction("tpot", answer.predicted_tpot_s, answer.measured_tpot_s)

    def _log_start(self, answer: Answer, card: ModelCard, plan: Plan) -> None:
        log.info("session %s: %s, %d prompt tokens, over %s", answer.session, card.name, answer.prompt_tokens, answer.plan_header)
