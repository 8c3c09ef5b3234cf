"""Finds the plans that answers start and go on with, and has their KV mirrored."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.session.answer import Answer
from meshd.agents.session.events import Replan
from meshd.agents.session.journal.record import SessionRecord
from meshd.agents.session.plan.resume import RecoveryRequest
from meshd.agents.session.plan.route import Router, mirror_targets
from meshd.agents.session.session import SessionState
from meshd.clock import Clock
from meshd.errors import DoesNotFit, MeshdError, NoPeer, NotReady, OutOfMemory, Overloaded, PeerFault, RemoteFailure, Superseded
from meshd.protocol.messages import Mirror, Mirrored
from meshd.types import Advert, PeerId, SessionId

log = getLogger(__name__)

_RETRY_S = 0.25
_ROOM_WAIT_S = 30.0
"""How long a request waits for KV room on its stages before it is told to come back."""
_UNNOTICED_S = 0.4
_LOADING_WAIT_S = 120.0
"""How long a running answer waits for lost layers to be loaded elsewhere."""
_NO_PLAN_WAIT_S = 3.0
"""What is left can't hold the model: the client is told soon, but a peer that only restarts is waited for."""
TAKEOVER_EPOCHS = 1000
"""A new coordinator's epochs begin this much higher: more than the last one can have used without the journal knowing."""
_PASSING = frozenset({OutOfMemory.code, NoPeer.code, Overloaded.code})
"""What a stage refuses to open with when it changed since the plan was made: another session took the room, a load gave way."""


@dataclass(slots=True)
class PlanRetrier:
    """Answers the machine's question for a plan."""

    links: Links
    router: Router
    adverts: Callable[[], list[Advert]]
    clock: Clock
    mirror: bool
    """Mirror where the request doesn't say."""
    take: Callable[[SessionId], Awaitable[SessionRecord]]
    """Have another coordinator give a session up to this peer."""
    elsewhere: Callable[[SessionId], Awaitable[bool]]
    """Whether another peer coordinates it."""

    def replan(self, answer: Answer, command: Replan) -> None:
        """Find a plan for an answer that lost its own; a later loss makes the search begin anew."""
        work = partial(self._recover, answer, command) if answer.machine.begun else partial(self._again, answer)
        answer.tasks.search(self._to_its_end(answer, work))

    def start(self, answer: Answer) -> None:
        """Find the first plan of an answer."""
        answer.tasks.search(self._to_its_end(answer, partial(self._first, answer)))

    async def _to_its_end(self, answer: Answer, search: Callable[[], Awaitable[None]]) -> None:
        """Run a search. An unexpected error fails the answer, which would otherwise wait for ever."""
        try:
            await search()
        except Exception as error:
            log.exception("session %s: looking for a plan failed", answer.session)
            answer.plan_failed(MeshdError(f"looking for a plan failed: {error}"))

    async def _first(self, answer: Answer) -> None:
        """A plan, as soon as other answers leave room for its KV."""
        until = answer.output.started + _ROOM_WAIT_S
        record = answer.record
        while True:
            try:
                plan = await self.router.plan_for(
                    answer.card, record.mesh, prompt_tokens=len(record.prompt), max_tokens=record.max_tokens
                )
            except Overloaded as error:
                if self.clock.monotonic() > until:
                    return answer.plan_failed(error)
                await self.clock.sleep(_RETRY_S)
            except MeshdError as error:
                return answer.plan_failed(error)
            else:
                return answer.planned(plan)

    async def _again(self, answer: Answer) -> None:
        """The first plan could not be opened: wait if that may pass, give up if it won't."""
        error = answer.machine.error
        if isinstance(error, RemoteFailure) and error.remote_code not in _PASSING:
            return answer.plan_failed(error)
        if self.clock.monotonic() > answer.output.started + _ROOM_WAIT_S:
            why = error.message if error is not None else "no stage opened"
            return answer.plan_failed(Overloaded(f"no room for this request's context: {why}", retry_after_s=5.0))
        if not isinstance(error, PeerFault) or isinstance(error, RemoteFailure):
            await self.clock.sleep(_RETRY_S)
        await self._first(answer)

    async def _recover(self, answer: Answer, command: Replan) -> None:
        began = self.clock.monotonic()
        error = answer.machine.error
        if isinstance(error, RemoteFailure) and error.remote_code == Superseded.code and not await self._reclaim(answer):
            return None
        while True:
            try:
                found = await self.router.recover(
                    answer.card, answer.record.mesh, self.recovery_request(answer, command.lost, command.avoid)
                )
            except (NotReady, Overloaded, DoesNotFit, NoPeer) as error:
                patience = _LOADING_WAIT_S if isinstance(error, NotReady) else _ROOM_WAIT_S
                if isinstance(error, DoesNotFit | NoPeer):
                    patience = _NO_PLAN_WAIT_S
                if self.clock.monotonic() - began > patience:
                    return answer.plan_failed(error)
                await self.clock.sleep(_RETRY_S)
            except MeshdError as error:
                return answer.plan_failed(error)
            else:
                return answer.planned(found.plan)

    async def _reclaim(self, answer: Answer) -> bool:
        """A stage obeys another coordinator, whether that lives or not; whether to go on here.

        Who took this peer for lost gives the session back if its reader is here. A stage that has not noticed yet that its
        coordinator is lost will soon.
        """
        if await self.elsewhere(answer.session):
            if not answer.readers:
                answer.release()
                return False
            try:
                record = await self.take(answer.session)
            except MeshdError as error:
                answer.plan_failed(error)
                return False
            answer.reclaim(record, record.epoch + TAKEOVER_EPOCHS)
        await self.clock.sleep(_UNNOTICED_S)
        return answer.running

    def recovery_request(
        self, answer: Answer, lost: frozenset[PeerId] = frozenset(), avoid: frozenset[PeerId] = frozenset()
    ) -> RecoveryRequest:
        """What the answer's next plan must offer."""
        old = answer.machine.rooted
        now = self.clock.monotonic()
        linked = {answer.context.me, *self.links.peers()}
        return RecoveryRequest(
            old=old,
            lost=lost | frozenset(peer for peer in (old.peers if old else ()) if peer not in linked),
            avoid=avoid | answer.recovery.distrusted(now),
            prompt_tokens=len(answer.record.prompt),
            max_tokens=answer.record.max_tokens,
            known=answer.machine.known,
            mirrors=dict(answer.mirrors),
        )

    def keep_mirrors(self, answer: Answer) -> None:
        """Have the KV of every stage of a running answer copied to a peer that could take over, where there is one."""
        wanted = answer.record.mesh.mirror if answer.record.mesh.mirror is not None else self.mirror
        plan = answer.plan
        if not wanted or plan is None or answer.machine.state not in (SessionState.PREFILLING, SessionState.DECODING):
            return
        if len(answer.mirrors) == len(plan.stages):
            return
        for number, stage in enumerate(mirror_targets(plan, self.adverts()).stages):
            if stage.mirror is None or number in answer.mirrors:
                continue
            answer.mirrored(number, stage.mirror, 0)
            answer.stages.send(
                stage.peer, Mirror(session=answer.session, epoch=answer.machine.epoch, stage=number, target=stage.mirror)
            )

    def on_mirrored(self, answer: Answer, message: Mirrored) -> None:
        """A stage reports how far the copy of its KV is."""
        known = answer.mirrors.get(message.stage)
        if known is None or known[0] != message.target or message.epoch != answer.machine.epoch:
            return
        answer.mirrored(message.stage, message.target, None if message.error else message.held)
