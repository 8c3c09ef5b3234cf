"""The coordinator: admits requests, starts and watches their answers, and retains them after their end for later readers.

It also takes over answers from a coordinator that was lost.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.observe.spans import Span, SpanKind, Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import with_peer_ids
from meshd.agents.service import NO_SECRET, AnswerSecret, AvailableModel, GenerationRequest
from meshd.agents.session.admission import Admission
from meshd.agents.session.answer import Answer, AnswerContext
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.keys import new_secret, session_of
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.record import SessionRecord, new_record, taken_over
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.session.plan.availability import Availability
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.agents.session.plan.route import Router
from meshd.agents.session.recovery_history import Recovered
from meshd.agents.session.report import report_end
from meshd.agents.session.stages.receiver import StageReceiver
from meshd.agents.session.stages.stall import StallWatch
from meshd.agents.session.takeover import Takeovers
from meshd.agents.text.intake import PromptIntake
from meshd.agents.text.model_texts import ModelText
from meshd.clock import Clock
from meshd.errors import MeshdError, Overloaded, PeerFault, Unavailable, UnknownModel, UnknownSession
from meshd.kernels.sampling.rules import check_sampling
from meshd.protocol.messages import Ack, Error, HandOver, Move, Moved, Tokens
from meshd.telemetry import Telemetry
from meshd.types import ModelCard, ModelId, PeerId, SessionId, TokenLogprobs

log = getLogger(__name__)

_TICK_S = 0.1
_CHECK_PLANS_S = 1.0
"""Interval at which running answers are checked for missing mirrors and better plans."""
_MAX_RETAINED, _MAX_RETAINED_BYTES = 256, 128 << 20
_RETAIN_S = 600.0
"""How long an answer that has ended or is suspended is retained for later readers."""
_HAND_OVER_S = 0.5
"""Time limit for the replies to HAND_OVER, while the next coordinator waits for the record."""
_MOVE_REPLY_S = 150.0
"""Time limit of a MOVE request: more than the time limits of a move in `plan/move.py` together."""


@dataclass(slots=True, kw_only=True)
class Coordinator:
    """Owns the answers that this peer coordinates. Implements `service.Coordinator`."""

    me: PeerId
    links: Links
    library: ModelLibrary
    router: Router
    admission: Admission
    retrier: PlanRetrier
    mover: Mover
    journal: JournalWriters
    deputy: Deputy
    locator: Locator
    clock: Clock
    telemetry: Telemetry
    story: Story
    spans: Spans
    events: EventStream
    names: Callable[[PeerId], str]
    readiness_of: Callable[[], tuple[bool, float, str]]
    leaving: Callable[[], bool]
    """Returns whether this peer is stopping: it then takes no new requests and waits for running answers."""
    answers: dict[SessionId, Answer] = field(default_factory=dict)
    """Running answers."""
    retained: OrderedDict[SessionId, Answer] = field(default_factory=OrderedDict)
    """Answers that have ended or are suspended, for later readers, oldest first."""
    _answerable: frozenset[ModelId] = frozenset()
    """Models that were answerable at the last check."""
    _admitted: dict[SessionId, float] = field(default_factory=dict)
    """Time at which each running answer got its admission slot."""
    _takeovers: Takeovers = field(init=False)
    _hand_overs: set["asyncio.Task[None]"] = field(default_factory=set)
    _prompts: PromptIntake = field(default_factory=PromptIntake)
    _available: Availability = field(init=False)
    _watch: StallWatch = field(init=False)
    _context: AnswerContext = field(init=False)
    _receiver: StageReceiver = field(init=False)

    def __post_init__(self) -> None:
        self._receiver = StageReceiver(self.answers, self.retrier, self.mover, self.names)
        self._available = Availability(self.library, lambda: self.router.adverts())
        self._watch = StallWatch(self.links, self.clock, self.me)
        self._takeovers = Takeovers(
            self.links, self.deputy, self.locator, self.clock, lambda session: session in self.answers, self._take_over
        )
        self._context = AnswerContext(
            me=self.me,
            links=self.links,
            clock=self.clock,
            story=self.story,
            events=self.events,
            names=self.names,
            on_replan=self.retrier.replan,
            on_opened=self._on_opened,
            on_token=self._on_new_token,
            on_recovered=self._on_recovered,
            on_superseded=self._on_superseded,
            on_end=self._on_end,
        )

    def register(self) -> None:
        """Register the handlers of FAILED, CLOSED, MIRRORED and MOVE. `meshd.peer.peer` calls the other `on_`s."""
        self._receiver.register(self.links)
        self.links.register(Move, self._on_move)

    async def run(self) -> None:
        """Renew leases, watch deadlines, and move sessions to better plans, until cancelled."""
        checked_at = 0.0
        while True:
            await self.clock.sleep(_TICK_S)
            now = self.clock.monotonic()
            for answer in list(self.answers.values()):
                self._watch.check(answer, now)
            self._takeovers.tick(now)
            self._expire(now)
            if now - checked_at > _CHECK_PLANS_S:
                checked_at = now
                await self._check_plans()

    async def close(self) -> None:
        """Cancel the running answers, and the tasks that continue sessions of other peers or hand sessions over to them."""
        self._takeovers.cancel()
        for task in self._hand_overs:
            task.cancel()
        for answer in list(self.answers.values()):
            await answer.cancel()

    async def _check_plans(self) -> None:
        answers = list(self.answers.values())
        for answer in answers:
            self.retrier.keep_mirrors(answer)
        self.mover.rebalance(answers)
        await self._retry_background()

    async def _retry_background(self) -> None:
        """Resume suspended background answers whose model has become answerable, because no reader will resume them."""
        cards = {card.id: card for card in self.router.answerable()}
        changed, self._answerable = cards.keys() - self._answerable, frozenset(cards)
        for model in changed:
            self.library.warm(cards[model])
        for answer in list(self.retained.values()):
            waits = answer.record.background and answer.status == "suspended"
            if waits and answer.record.model in changed and self.admission.free:
                await self._revive(answer)

    def card(self, model: str) -> ModelCard | None:
        """See `service.Coordinator.card`."""
        return next((card for card in self.library.cards().values() if model in (card.name, card.ref, card.id)), None)

    async def models(self) -> list[AvailableModel]:
        """See `service.Coordinator.models`."""
        return await self._available.models()

    def readiness(self) -> tuple[bool, float, str]:
        """See `service.Coordinator.readiness`. A peer that stops is not ready, so that load balancers send it no requests."""
        return (False, 1.0, "this peer is about to stop") if self.leaving() else self.readiness_of()

    async def generate(self, request: GenerationRequest, *, on_wait: Callable[[], None] | None = None) -> Answer:
        """See `service.Coordinator.generate`."""
        if self.leaving():
            raise Unavailable("this peer is about to stop and takes no new requests", hint="ask another peer")
        card = await self.library.known(request.model)
        check_sampling(request.sampling, card.spec.vocab)
        mesh = with_peer_ids(request.mesh, self.router.adverts(), card.id)
        request = msgspec.structs.replace(request, mesh=mesh)
        text = await self.library.text(card)
        prompt = await self._prompts.encode(request, card, text)
        secret = new_secret(self.clock)
        record = new_record(request, card, prompt.tokens, self.me, secret, self.clock)
        answer = await self._admit(record, card, text, secret, on_wait)
        answer.ignored = prompt.ignored
        self.retrier.start(answer)
        try:
            await answer.opened
        except asyncio.CancelledError:
            await answer.cancel()
            raise
        except Overloaded as error:
            retry_after_s = max(error.retry_after_s, self.admission.retry_after_s)
            raise Overloaded(error.message, hint=error.hint, retry_after_s=retry_after_s) from error
        log.info("session %s: %s, %d prompt tokens, over %s", answer.session, card.name, len(record.prompt), answer.plan_header)
        return answer

    async def _admit(
        self, record: SessionRecord, card: ModelCard, text: ModelText, secret: AnswerSecret, on_wait: Callable[[], None] | None
    ) -> Answer:
        asked = self.clock.monotonic()
        await self.admission.enter(on_wait)
        now = self.clock.monotonic()
        self.telemetry.queue_wait(now - asked)
        try:
            answer = Answer(record, card, text, self._context, secret)
        except BaseException:
            self.admission.leave(0.0)
            raise
        self._run(answer, now)
        return answer

    def _run(self, answer: Answer, since: float) -> None:
        self.retained.pop(answer.session, None)
        self.answers[answer.session] = answer
        self._admitted[answer.session] = since

    async def resume(self, secret: AnswerSecret) -> Answer:
        """See `service.Coordinator.resume`."""
        answer = self._answer_with(secret)
        if answer is None:
            return await self._take(secret)
        return answer if answer.running or answer.ended else await self._revive(answer)

    async def look(self, secret: AnswerSecret) -> Answer:
        """See `service.Coordinator.look`."""
        answer = self._answer_with(secret)
        if answer is not None:
            return answer
        return await self._restore(await self.locator.fetch(secret, take=False), secret)

    def _answer_with(self, secret: AnswerSecret) -> Answer | None:
        session = session_of(secret)
        answer = self.answers.get(session) or self.retained.get(session)
        if answer is not None:
            answer.secret = secret  # a peer that took the answer over as a deputy does not have it
        return answer

    async def end(self, session: SessionId, *, forget: bool = False) -> None:
        """See `service.Coordinator.end`."""
        if forget or not self.finish(session, forget):
            await self.locator.end(session, forget=forget)  # ends the session on this peer too

    def own(self, session: SessionId) -> SessionRecord | None:
        """Returns: the record of an answer that this peer coordinates or retains; None for any other."""
        answer = self.answers.get(session) or self.retained.get(session)
        return answer.snapshot() if answer is not None else None

    async def hand_over(self, session: SessionId, to: PeerId) -> None:
        """Stop coordinating an answer and leave its stages open, because `to` continues it.

        The peers that have the session's KV or its record hear from this peer who coordinates it now: they believe nobody else.
        """
        answer = self.answers.get(session) or self.retained.get(session)
        if answer is None:
            return
        peers = {*answer.machine.holders, *self.journal.deputies_of(session)}
        answer.release()
        self.retained.pop(session, None)
        self.journal.release(session)

        async def tell(peer: PeerId) -> None:
            with suppress(MeshdError):  # a peer that does not hear it obeys the new coordinator once this peer is gone
                await self.links.request(
                    peer, lambda number: HandOver(request=number, session=session, to=to), timeout_s=_HAND_OVER_S
                )

        async with asyncio.TaskGroup() as group:
            for peer in sorted(peers):
                group.create_task(tell(peer))

    def leave(self) -> None:
        """Give up all running answers, because this peer stops.

        An answer with `store` and a deputy is released: its stages stay open for the deputy. Other answers are suspended.
        """
        for answer in list(self.answers.values()):
            if answer.record.store and self.journal.deputies_of(answer.session):
                answer.release("this peer stops")
            else:
                answer.suspend()

    def finish(self, session: SessionId, forget: bool) -> bool:
        """Cancel an answer of this peer; with `forget`, delete its record too. Returns: whether this peer has the answer."""
        answer = self.answers.get(session) or self.retained.get(session)
        if answer is None:
            return False
        answer.end()
        if forget:
            self.retained.pop(session, None)
            self.journal.end(session, "cancelled", keep=False)
        return True

    async def _take(self, secret: AnswerSecret) -> Answer:
        """Take an answer over from another peer, and resume it on this peer if it has not ended."""
        record = await self.locator.fetch(secret, take=True)
        answer = await self._restore(record, secret)
        if answer.ended:
            self._retain(answer)
            self._adopt(answer)
            return answer
        return await self._revive(answer)

    async def _restore(self, record: SessionRecord, secret: AnswerSecret = NO_SECRET) -> Answer:
        card = self._find_card(record.model)
        text = await self.library.text(card)
        answer = Answer(taken_over(record, self.me), card, text, self._context, secret)
        await answer.restore()
        return answer

    def _find_card(self, model: ModelId) -> ModelCard:
        card = self.library.cards().get(model)
        if card is None:
            raise UnknownModel(f"no live peer has the model {model} of this session", hint="start one that has its file")
        return card

    async def _revive(self, answer: Answer, *, at_once: bool = False) -> Answer:
        """Resume a suspended answer. `at_once`: don't wait behind other requests.

        Returns: the session's answer, which another reader may have resumed first.
        Raises: Overloaded.
        """
        if at_once:
            self.admission.enter_ahead()
        else:
            await self.admission.enter()
        running = self.answers.get(answer.session)
        if running is not None or answer.running or answer.ended:
            self.admission.leave(0.0)
            return running or answer
        self._run(answer, self.clock.monotonic())
        self._adopt(answer)
        answer.resume()
        return answer

    def _adopt(self, answer: Answer) -> None:
        """Become the answer's coordinator: journal it to deputies, and delete the record that this peer kept as a deputy."""
        self.deputy.forget(answer.session)
        self._journal(answer)

    def take_over(self, session: SessionId, coordinator: PeerId) -> None:
        """Take an answer over from a lost coordinator, unless another peer should."""
        self._takeovers.add(session, coordinator)

    async def _take_over(self, record: SessionRecord) -> None:
        answer = await self._restore(record)
        if answer.ended or record.suspended:
            self._retain(answer)
            self._adopt(answer)
            return
        previous = self.names(record.coordinator)
        log.info("session %s: taking over from %s, at token %d", record.session, previous, len(answer.output.tokens))
        self.story.note(record.session, "taken over", coordinator=previous, tokens=len(answer.output.tokens))
        await self._revive(answer, at_once=True)

    async def move(self, session: SessionId, target: PeerId, source: PeerId | None) -> Moved:
        """Move an answer's stages at `source` (None: all stages) to `target`, whichever peer coordinates the answer.

        Raises: UnknownSession, InvalidRequest, NoPeer, PeerFault.
        """
        answer = self.answers.get(session)
        if answer is None:
            coordinator = await self.locator.coordinator_of(session)
            reply, _ = await self.links.request(
                coordinator,
                Move(request=self.links.next_request(), session=session, target=target, source=source),
                timeout_s=_MOVE_REPLY_S,
            )
            if not isinstance(reply, Moved):
                raise PeerFault(f"MOVE was answered with {type(reply).__name__}")
            return reply
        return await self._move(0, answer, target, source)

    async def _move(self, request: int, answer: Answer, target: PeerId, source: PeerId | None) -> Moved:
        pause_s, plan = await self.mover.move(answer, target, source)
        return Moved(request=request, pause_s=pause_s, plan=plan)

    async def _on_move(self, sender: PeerId, message: Move, payload: memoryview) -> Moved:
        answer = self.answers.get(message.session)
        if answer is None:
            raise UnknownSession(f"session {message.session} is not coordinated here")
        return await self._move(message.request, answer, message.target, message.source)

    def on_tokens(self, sender: PeerId, message: Tokens, payload: memoryview) -> None:
        """Take TOKENS from a stage."""
        self._receiver.on_tokens(sender, message)

    def on_ack(self, sender: PeerId, message: Ack) -> None:
        """Take an ACK from a first stage."""
        self._receiver.on_ack(sender, message)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """Take an ERROR from a stage's peer."""
        self._receiver.on_error(sender, message)

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """Recover the answers whose plans use this peer, because its link is down."""
        for answer in list(self.answers.values()):
            answer.on_peer_gone(peer, reason)

    def _on_opened(self, answer: Answer) -> None:
        """Journal the plan that runs now, and request its mirrors."""
        self._journal(answer)
        self.retrier.keep_mirrors(answer)

    def _on_new_token(self, answer: Answer, index: int, token: int, logprobs: TokenLogprobs | None) -> None:
        self.journal.token(answer.session, index, token, logprobs)
        now = self.clock.monotonic()
        self.spans.add(answer.session, Span(SpanKind.TOKEN, answer.machine.epoch, 0, index, 1, now, now, now, now))

    def _on_recovered(self, answer: Answer, recovered: Recovered) -> None:
        self.telemetry.recovery(recovered.method, recovered.cause, recovered.pause_s)
        pause_ms = 1000 * recovered.pause_s
        log.info("session %s continues (%s) after %.0f ms: %s", answer.session, recovered.method, pause_ms, recovered.reason)

    def _on_superseded(self, answer: Answer, coordinator: PeerId) -> None:
        work = self.hand_over(answer.session, coordinator)  # in a task of its own: the answer's tasks are cancelled with it
        task = asyncio.get_running_loop().create_task(work, name=f"hand over {answer.session}")
        self._hand_overs.add(task)
        task.add_done_callback(self._hand_overs.discard)

    def _on_end(self, answer: Answer) -> None:
        since = self._admitted.pop(answer.session, None)
        if since is None:
            return
        self.answers.pop(answer.session, None)
        self.admission.leave(self.clock.monotonic() - since)
        if answer.machine.released:
            self.journal.release(answer.session)
        elif answer.ended:
            keep = answer.record.store and answer.machine.begun  # nobody was told the id of one that never ran
            if keep:
                self._retain(answer)
            self.journal.end(answer.session, answer.snapshot().finish, keep=keep)
        else:
            self._retain(answer)
            self._journal(answer)
        report_end(answer, self.telemetry, self.events)

    def _journal(self, answer: Answer) -> None:
        """Queue a transfer of the answer's full record to its deputies."""
        self.journal.begin(answer.session, answer.snapshot, lambda: answer.plan.peers if answer.plan else ())

    def _retain(self, answer: Answer) -> None:
        """Retain an answer for later readers. Forget the oldest ones beyond `_MAX_RETAINED` and `_MAX_RETAINED_BYTES`."""
        self.retained[answer.session] = answer
        self.retained.move_to_end(answer.session)
        size = sum(kept.output.size for kept in self.retained.values())
        while len(self.retained) > _MAX_RETAINED or (size > _MAX_RETAINED_BYTES and len(self.retained) > 1):
            oldest = next(iter(self.retained.values()))
            size -= oldest.output.size
            self._forget(oldest)

    def _expire(self, now: float) -> None:
        for answer in list(self.retained.values()):
            if now - answer.ended_at > _RETAIN_S and not answer.readers:
                self._forget(answer)

    def _forget(self, answer: Answer) -> None:
        self.retained.pop(answer.session, None)
        self.journal.end(answer.session, "", keep=False)
