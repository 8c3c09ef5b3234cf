"""Requests on the peer that took them, or took them over: tokenise, admit, start, watch until the end, keep for later readers."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.observe.story import Story
from meshd.agents.placement.model_library import ModelLibrary, ModelText
from meshd.agents.service import GenerationRequest
from meshd.agents.session.admission import Admission
from meshd.agents.session.answer import Answer, AnswerContext
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.record import SessionRecord, new_record
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import TAKEOVER_EPOCHS, PlanRetrier
from meshd.agents.session.plan.route import Router
from meshd.agents.session.recovery import Recovered
from meshd.agents.session.report import report_end
from meshd.agents.session.stages.receiver import StageReceiver
from meshd.agents.session.stages.stall import StallWatch
from meshd.clock import Clock
from meshd.errors import MeshdError, PeerFault, Unavailable, UnknownModel, UnknownSession
from meshd.protocol.messages import Error, Move, Moved, Token
from meshd.telemetry import Telemetry
from meshd.types import ModelCard, ModelId, PeerId, SessionId, TokenLogprobs

log = getLogger(__name__)

_TICK_S = 0.1
_LOOK_AROUND_S = 1.0
"""How often running answers are compared with what the mesh could do for them now."""
_SETTLE_S = 0.5
"""A link that only broke is back by then, and its coordinator with it."""
_KEPT = 256
_KEPT_S = 600.0
"""How many answers that do not run are kept for later readers, and how long."""


@dataclass(slots=True, kw_only=True)
class Coordinator:
    """Implements `service.Coordinator` (with `models` and `readiness` from the library and the router)."""

    me: PeerId
    links: Links
    library: ModelLibrary
    router: Router
    admission: Admission
    rescuer: PlanRetrier
    mover: Mover
    journal: JournalWriters
    deputy: Deputy
    locator: Locator
    clock: Clock
    telemetry: Telemetry
    story: Story
    names: Callable[[PeerId], str]
    readiness_of: Callable[[], tuple[bool, float, str]]
    leaving: Callable[[], bool]
    """Whether this peer is stopping: it waits for running answers and takes no new ones."""
    answers: dict[SessionId, Answer] = field(default_factory=dict)
    """Those that run."""
    kept: OrderedDict[SessionId, Answer] = field(default_factory=OrderedDict)
    """Those that ended or are suspended, for later readers."""
    _answerable: frozenset[ModelId] = frozenset()
    """Models that could answer at the last look."""
    _admitted: dict[SessionId, float] = field(default_factory=dict)
    """Since when an answer has its ticket."""
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    _watch: StallWatch = field(init=False)
    _context: AnswerContext = field(init=False)
    _receiver: StageReceiver = field(init=False)

    def __post_init__(self) -> None:
        self._receiver = StageReceiver(self.answers, self.rescuer, self.mover, self.names)
        self._watch = StallWatch(self.links, self.clock, self.me)
        self._context = AnswerContext(
            me=self.me,
            links=self.links,
            clock=self.clock,
            story=self.story,
            names=self.names,
            on_replan=self.rescuer.replan,
            on_opened=self._on_opened,
            on_token=self._on_new_token,
            on_recovered=self._on_recovered,
            on_end=self._on_end,
        )

    def register(self) -> None:
        """Take what stages send to their coordinator. TOKEN, which the first stage gets too, comes from `compose.Peer`."""
        self._receiver.register(self.links)
        self.links.register(Move, self._on_move)

    async def run(self) -> None:
        """Renew leases, watch deadlines, move what should move. Cancel: every session is closed on its stages."""
        checked_at = 0.0
        try:
            while True:
                await self.clock.sleep(_TICK_S)
                now = self.clock.monotonic()
                for answer in list(self.answers.values()):
                    self._watch.look(answer, now)
                self._expire(now)
                if now - checked_at > _LOOK_AROUND_S:
                    checked_at = now
                    await self._check_plans()
        finally:
            for task in self._tasks:
                task.cancel()
            for answer in list(self.answers.values()):
                await answer.cancel()

    async def _check_plans(self) -> None:
        answers = list(self.answers.values())
        for answer in answers:
            self.rescuer.keep_mirrors(answer)
        self.mover.look_for_better(answers)
        await self._try_again()

    async def _try_again(self) -> None:
        """Background answers that found no plan: nobody asks for them, so they are tried again when the mesh has changed."""
        models = frozenset(card.id for card in self.router.answerable())
        changed, self._answerable = models - self._answerable, models
        for answer in list(self.kept.values()):
            waits = answer.record.background and answer.status == "suspended"
            if waits and answer.record.model in changed and self.admission.free:
                await self._revive(answer)

    def models(self) -> list[ModelCard]:
        """See `service.Coordinator.models`."""
        return self.router.answerable()

    def readiness(self) -> tuple[bool, float, str]:
        """See `service.Coordinator.readiness`."""
        return self.readiness_of()

    async def generate(self, request: GenerationRequest) -> Answer:
        """See `service.Coordinator.generate`."""
        if self.leaving():
            raise Unavailable("this peer is about to stop", hint="ask another one")
        card = self.library.find(request.model)
        text = await self.library.text(card)
        # On another thread: a long prompt, or a template that loops, must not hold up the heartbeats.
        prompt = await asyncio.to_thread(text.tokens_of, request.prompt, request.template)
        record = new_record(request, card, prompt, self.me, self.clock)
        answer = await self._admit(record, card, text)
        self.rescuer.start(answer)
        try:
            await answer.opened
        except asyncio.CancelledError:
            await answer.cancel()
            raise
        log.info("session %s: %s, %d prompt tokens, over %s", answer.session, card.name, len(prompt), answer.plan_header)
        return answer

    async def _admit(self, record: SessionRecord, card: ModelCard, text: ModelText) -> Answer:
        asked = self.clock.monotonic()
        await self.admission.enter()
        now = self.clock.monotonic()
        self.telemetry.queue_wait(now - asked)
        try:
            answer = Answer(record, card, text, self._context)
        except BaseException:
            self.admission.leave(0.0)
            raise
        self._run(answer, now)
        return answer

    def _run(self, answer: Answer, since: float) -> None:
        self.kept.pop(answer.session, None)
        self.answers[answer.session] = answer
        self._admitted[answer.session] = since
        self.telemetry.sessions_active(len(self.answers))

    async def resume(self, session: SessionId) -> Answer:
        """See `service.Coordinator.resume`."""
        answer = self.answers.get(session) or self.kept.get(session)
        if answer is None:
            return await self._take(session)
        return answer if answer.running or answer.ended else await self._revive(answer)

    async def look(self, session: SessionId) -> Answer:
        """See `service.Coordinator.look`."""
        answer = self.answers.get(session) or self.kept.get(session)
        if answer is not None:
            return answer
        return await self._restore(await self.locator.fetch(session, take=False))

    async def end(self, session: SessionId, *, forget: bool = False) -> None:
        """See `service.Coordinator.end`."""
        if forget or not self.finish(session, forget):
            await self.locator.end(session, forget=forget)  # which ends it here too

    def own(self, session: SessionId) -> SessionRecord | None:
        """The record of an answer that this peer coordinates or keeps."""
        answer = self.answers.get(session) or self.kept.get(session)
        return answer.snapshot() if answer is not None else None

    def release(self, session: SessionId) -> None:
        """Another peer goes on with this answer: its stages stay as they are."""
        answer = self.answers.get(session) or self.kept.get(session)
        if answer is not None:
            answer.release()
            self.kept.pop(session, None)
            self.journal.release(session)

    def leave(self) -> None:
        """This peer stops: what has a deputy is left to it, stages and all; the rest is suspended or ends."""
        for answer in list(self.answers.values()):
            if answer.record.store and self.journal.deputies_of(answer.session):
                answer.release("this peer stops")
            else:
                answer.suspend()

    def finish(self, session: SessionId, forget: bool) -> bool:
        """Cancel an answer of this peer, and forget it if asked. Returns: whether there was one."""
        answer = self.answers.get(session) or self.kept.get(session)
        if answer is None:
            return False
        answer.end()
        if forget:
            self.kept.pop(session, None)
            self.journal.end(session, "cancelled", keep=False)
        return True

    async def _take(self, session: SessionId) -> Answer:
        """Continue another peer's answer here."""
        record = await self.locator.fetch(session, take=True)
        answer = await self._restore(record)
        if answer.ended:
            self._keep(answer)
            self._adopt(answer)
            return answer
        answer.stages.handed_over = True
        return await self._revive(answer)

    async def _restore(self, record: SessionRecord) -> Answer:
        card = self._find_card(record.model)
        text = await self.library.text(card)
        return Answer(
            msgspec.structs.replace(record, epoch=record.epoch + TAKEOVER_EPOCHS, coordinator=self.me), card, text, self._context
        )

    def _find_card(self, model: ModelId) -> ModelCard:
        card = self.library.cards().get(model)
        if card is None:
            raise UnknownModel(f"no live peer has the model {model} of this session", hint="start one that has its file")
        return card

    async def _revive(self, answer: Answer) -> Answer:
        """Run a suspended answer; the one that runs, if another reader was quicker."""
        await self.admission.enter()
        present = self.answers.get(answer.session)
        if present is not None or answer.running or answer.ended:
            self.admission.leave(0.0)
            return present or answer
        self._run(answer, self.clock.monotonic())
        self._adopt(answer)
        answer.resume()
        return answer

    def _adopt(self, answer: Answer) -> None:
        """Coordinate the answer here: find it a deputy, and stop keeping its record for the previous coordinator."""
        self.deputy.forget(answer.session)
        self._journal(answer)

    def take_over(self, record: SessionRecord) -> None:
        """Take over an answer whose record this peer keeps: its coordinator is lost."""
        task = asyncio.get_running_loop().create_task(self._take_over(record), name=f"take over {record.session}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_over(self, record: SessionRecord) -> None:
        await self.clock.sleep(_SETTLE_S)
        if record.coordinator in self.links.peers():
            return  # only the link had broken
        try:
            if record.session in self.answers or not (record.finish or await self.locator.is_heir(record)):
                return
            answer = await self._restore(self.deputy.record(record.session) or record)
            if answer.ended or record.suspended:
                self._keep(answer)
                self._adopt(answer)
                return
            last = self.names(record.coordinator)
            log.info("session %s: taking over from %s, at token %d", record.session, last, len(answer.output.tokens))
            self.story.note(record.session, "taken over", coordinator=last, tokens=len(answer.output.tokens))
            await self._revive(answer)
        except MeshdError as error:
            log.warning("session %s was not taken over: %s", record.session, error)

    async def move(self, session: SessionId, target: PeerId, source: PeerId | None) -> Moved:
        """Move an answer's stages, wherever it is coordinated. Raises: UnknownSession, InvalidRequest, NoPeer, PeerFault."""
        answer = self.answers.get(session)
        if answer is None:
            coordinator = await self.locator.coordinator_of(session)
            reply, _ = await self.links.request(
                coordinator,
                Move(request=self.links.next_request(), session=session, target=target, source=source),
                timeout_s=150.0,
            )
            if not isinstance(reply, Moved):
                raise PeerFault(f"MOVE was answered with {type(reply).__name__}")
            return reply
        return await self._move(0, answer, target, source)

    async def _move(self, request: int, answer: Answer, target: PeerId, source: PeerId | None) -> Moved:
        pause_s = await self.mover.move(answer, target, source)
        assert answer.plan is not None
        return Moved(request=request, pause_s=pause_s, plan=answer.plan)

    async def _on_move(self, sender: PeerId, message: Move, payload: memoryview) -> Moved:
        answer = self.answers.get(message.session)
        if answer is None:
            raise UnknownSession(f"session {message.session} is not coordinated here")
        return await self._move(message.request, answer, message.target, message.source)

    def on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """Take a TOKEN from a stage."""
        self._receiver.on_token(sender, message)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """Take an ERROR from a stage's peer."""
        self._receiver.on_error(sender, message)

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """A link is down: sessions that ran through it need another plan."""
        for answer in list(self.answers.values()):
            answer.on_peer_gone(peer, reason)

    def _on_opened(self, answer: Answer) -> None:
        """A plan runs: the journal must know it, and mirrors start."""
        self._journal(answer)
        self.rescuer.keep_mirrors(answer)

    def _on_new_token(self, answer: Answer, index: int, token: int, logprobs: TokenLogprobs | None) -> None:
        self.journal.token(answer.session, index, token, logprobs)

    def _on_recovered(self, answer: Answer, recovered: Recovered) -> None:
        self.telemetry.recovery(recovered.method, recovered.pause_s)
        pause_ms = 1000 * recovered.pause_s
        log.info("session %s goes on (%s) after %.0f ms: %s", answer.session, recovered.method, pause_ms, recovered.reason)

    def _on_end(self, answer: Answer) -> None:
        since = self._admitted.pop(answer.session, None)
        if since is None:
            return
        self.answers.pop(answer.session, None)
        self.admission.leave(self.clock.monotonic() - since)
        if answer.machine.released:
            self.journal.release(answer.session)
        elif answer.ended:
            if answer.record.store:
                self._keep(answer)
            self.journal.end(answer.session, answer.snapshot().finish, keep=answer.record.store)
        else:
            self._keep(answer)
            self._journal(answer)
        self.telemetry.sessions_active(len(self.answers))
        report_end(answer, self.telemetry)

    def _journal(self, answer: Answer) -> None:
        """Send the answer's whole record to its deputies."""
        self.journal.begin(answer.session, answer.snapshot, lambda: answer.plan.peers if answer.plan else ())

    def _keep(self, answer: Answer) -> None:
        """Oldest go first."""
        self.kept[answer.session] = answer
        self.kept.move_to_end(answer.session)
        while len(self.kept) > _KEPT:
            self._forget(next(iter(self.kept.values())))

    def _expire(self, now: float) -> None:
        for answer in list(self.kept.values()):
            if now - answer.ended_at > _KEPT_S and not answer.readers:
                self._forget(answer)

    def _forget(self, answer: Answer) -> None:
        self.kept.pop(answer.session, None)
        self.journal.end(answer.session, "", keep=False)
