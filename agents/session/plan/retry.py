"""Finds plans for answers and retries while none is possible: first plans, and new ones after a loss. Also requests KV mirrors."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from zlib import crc32

from meshd.agents.links.links import Links
from meshd.agents.placement.client import numerics_of_peer
from meshd.agents.service import AnswerSecret
from meshd.agents.session.answer import Answer
from meshd.agents.session.events import Replan
from meshd.agents.session.journal.record import TAKEOVER_EPOCHS, SessionRecord
from meshd.agents.session.plan.mirror_targets import mirror_targets
from meshd.agents.session.plan.open_ended import LEAST_ANSWER, plan_open_ended
from meshd.agents.session.plan.resume import RecoveryRequest
from meshd.agents.session.plan.route import Router
from meshd.agents.session.recovery_history import NEAR_TIE
from meshd.agents.session.session import SessionState
from meshd.agents.session.stages.client import is_refusal
from meshd.clock import Clock
from meshd.errors import DoesNotFit, MeshdError, NoPeer, NotReady, Overloaded, PeerFault, RemoteFailure, Superseded, UsageError
from meshd.numerics import UNKNOWN
from meshd.protocol.messages import Mirrored
from meshd.types import Advert, PeerId, Plan, SessionId

log = getLogger(__name__)

_RETRY_S = 0.25
_KV_WAIT_S = 30.0
"""How long a request waits for free KV on its stages before it fails with Overloaded."""
_NOTICE_S = 0.4
"""A stage may take this long to notice that its coordinator is lost, before it accepts another coordinator."""
_LOADING_WAIT_S = 120.0
"""How long a running answer waits for lost layers to be loaded elsewhere."""
_NO_PLAN_WAIT_S = 3.0
"""How long an answer waits when the live peers cannot hold the model: short, but a peer that restarts may be back by then."""
_TRIED_AT_ONCE = 1
"""A plan that failed without a token, so many plans after the last token, is tried again at once; after more, with a pause: what
made them fail needs time to pass, and the attempts are bounded (`MAX_ATTEMPTS`)."""
_LONGEST_RETRY_S = 4.0
"""Sessions that found no room on a stage, or whose plan failed again, try again after `_RETRY_S`, doubled with each attempt up to
this time."""


@dataclass(slots=True)
class PlanRetrier:
    """Carries out the session's `Replan` command: searches until there is a plan or a time limit has passed."""

    links: Links
    router: Router
    adverts: Callable[[], list[Advert]]
    clock: Clock
    mirror: bool
    """Whether to mirror KV if the request has no `mirror` option."""
    take: Callable[[AnswerSecret], Awaitable[SessionRecord]]
    """Makes this peer the coordinator of the answer with this secret, and returns its record."""
    other_coordinator: Callable[[SessionRecord], Awaitable[PeerId | None]]
    """Returns another peer that coordinates the record's session, or None."""

    def replan(self, answer: Answer, command: Replan) -> None:
        """Search for a plan for an answer that lost its plan. Cancels the answer's previous search."""
        work = partial(self._recover, answer, command) if answer.machine.begun else partial(self._retry_first, answer)
        answer.tasks.search(self._run_search(answer, work))

    def start(self, answer: Answer) -> None:
        """Find the first plan of an answer."""
        answer.tasks.search(self._run_search(answer, partial(self._find_first, answer)))

    async def _run_search(self, answer: Answer, search: Callable[[], Awaitable[None]]) -> None:
        """Run a search. An unexpected error fails the answer, which would otherwise wait forever."""
        try:
            await search()
        except Exception as error:
            log.exception("session %s: the search for a plan failed", answer.session)
            answer.plan_failed(MeshdError(f"the search for a plan failed: {error}"))

    async def _find_first(self, answer: Answer) -> None:
        """Find the first plan of an answer. Retry for up to `_KV_WAIT_S` while other answers take the KV."""
        until = answer.output.started + _KV_WAIT_S
        while True:
            late = self.clock.monotonic() > until
            try:
                plan = await self._first_plan(answer, late=late)
            except Overloaded as error:
                if late:
                    return answer.plan_failed(error)
                await self.clock.sleep(_RETRY_S)
            except MeshdError as error:
                return answer.plan_failed(error)
            else:
                return answer.planned(plan)

    async def _first_plan(self, answer: Answer, *, late: bool) -> Plan:
        """Plan with KV for the whole answer. An answer whose length nobody asked for is limited to the KV that is free.

        late: this is the last try, so such an answer may be as short as one token.
        """
        record = answer.record
        tokens = {"prompt_tokens": len(record.prompt), "max_tokens": record.max_tokens}
        if not record.open_ended:
            return await self.router.plan_for(answer.card, record.mesh, **tokens)
        least_tokens = 1 if late else LEAST_ANSWER
        plan = await plan_open_ended(self.router, answer.card, record.mesh, **tokens, least_tokens=least_tokens)
        answer.limit(plan.context - len(record.prompt))
        return plan

    async def _retry_first(self, answer: Answer) -> None:
        """Find another first plan after a stage of the previous one could not be opened. Give up if the error is not transient."""
        error = answer.machine.error
        if isinstance(error, UsageError) or (isinstance(error, RemoteFailure) and not is_refusal(error)):
            return answer.plan_failed(error)
        if self.clock.monotonic() > answer.output.started + _KV_WAIT_S:
            why = error.message if error is not None else "no stage opened"
            return answer.plan_failed(Overloaded(f"no memory for this request's context: {why}", retry_after_s=5.0))
        if not isinstance(error, PeerFault) or isinstance(error, RemoteFailure):
            await self.clock.sleep(retry_after_s(answer.session, answer.machine.attempts))
        await self._find_first(answer)

    async def _recover(self, answer: Answer, command: Replan) -> None:
        began = self.clock.monotonic()
        error = answer.machine.error
        if isinstance(error, UsageError):
            return answer.plan_failed(error)
        if isinstance(error, RemoteFailure) and error.remote_code == Superseded.code and not await self._reclaim(answer):
            return None
        if is_refusal(error) and answer.machine.attempts:
            await self.clock.sleep(retry_after_s(answer.session, answer.machine.attempts))
        failed, paused = answer.machine.plan, is_refusal(error) or answer.machine.attempts <= _TRIED_AT_ONCE
        while True:
            try:
                found = await self.router.recover(
                    answer.card, answer.record.mesh, self.recovery_request(answer, command.lost, command.avoid)
                )
            except (NotReady, Overloaded, DoesNotFit, NoPeer) as error:
                patience = _LOADING_WAIT_S if isinstance(error, NotReady) else _KV_WAIT_S
                if isinstance(error, DoesNotFit | NoPeer):
                    patience = _NO_PLAN_WAIT_S
                if self.clock.monotonic() - began > patience:
                    return answer.plan_failed(error)
                await self.clock.sleep(_RETRY_S)
            except MeshdError as error:
                return answer.plan_failed(error)
            else:
                if paused or failed is None or found.plan.stages != failed.stages:
                    return answer.planned(found.plan)
                paused = True
                await self.clock.sleep(retry_after_s(answer.session, answer.machine.attempts - _TRIED_AT_ONCE))

    async def _reclaim(self, answer: Answer) -> bool:
        """Settle which peer coordinates an answer, after a stage refused this peer because the stage obeys another coordinator.

        The other coordinator may have taken over because it believed that this peer was lost. If the answer has readers here, this
        peer takes the answer back; otherwise it hands the answer over. If no other peer claims to coordinate the answer, the stage
        still obeys a lost coordinator, and will soon notice the loss.

        Returns: whether this peer continues the answer.
        """
        other = await self.other_coordinator(answer.record)
        if other is not None:
            if not answer.readers:
                answer.context.on_superseded(answer, other)
                return False
            try:
                record = await self.take(answer.secret)
            except MeshdError as error:
                answer.plan_failed(error)
                return False
            answer.reclaim(record.coordinator, record.epoch + TAKEOVER_EPOCHS)
        await self.clock.sleep(_NOTICE_S)
        return answer.running

    def recovery_request(
        self, answer: Answer, lost: frozenset[PeerId] = frozenset(), avoid: frozenset[PeerId] = frozenset()
    ) -> RecoveryRequest:
        """Returns: what the answer's next plan must offer."""
        old = answer.machine.kv_plan
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
        """Have the KV of each stage of a running answer copied to a peer that could take the stage over, if there is one."""
        enabled = answer.record.mesh.mirror if answer.record.mesh.mirror is not None else self.mirror
        plan = answer.plan
        if not enabled or plan is None or answer.machine.state not in (SessionState.PREFILLING, SessionState.DECODING):
            return
        if len(answer.mirrors) == len(plan.stages):
            return
        for number, stage in enumerate(mirror_targets(plan, self.adverts()).stages):
            if stage.mirror is None or number in answer.mirrors:
                continue
            answer.mirrored(number, stage.mirror, 0)
            numerics = numerics_of_peer(self.adverts(), stage.mirror)
            if plan.numerics_of(number) not in (UNKNOWN, numerics):
                answer.context.story.note(
                    answer.session, "mirror on other numerics", stage=number, peer=stage.mirror, numerics=numerics, effect=NEAR_TIE
                )
            answer.tasks.spawn(self._mirror(answer, answer.machine.epoch, plan, number, stage.mirror))

    async def _mirror(self, answer: Answer, epoch: int, plan: Plan, stage: int, target: PeerId) -> None:
        try:
            await answer.stages.mirror(epoch, plan, stage, target)
        except MeshdError as error:
            log.info("session %s: %s takes no copy of stage %d: %s", answer.session, answer.context.names(target), stage, error)
            if answer.machine.epoch == epoch and answer.mirrors.get(stage) == (target, 0):
                answer.mirrored(stage, target, None)

    def on_mirrored(self, answer: Answer, message: Mirrored) -> None:
        """Record a stage's report of the progress of its mirror."""
        mirror = answer.mirrors.get(message.stage)
        if mirror is None or mirror[0] != message.target or message.epoch != answer.machine.epoch:
            return
        answer.mirrored(message.stage, message.target, None if message.error else message.held)


def retry_after_s(session: SessionId, attempts: int) -> float:
    """Returns: seconds until a session tries again after a stage refused it for lack of room, or its plan failed again.

    Sessions of different coordinators that want the same room would otherwise refuse one another again and again in step. So the
    time differs from session to session and grows with each attempt.
    """
    share = crc32(f"{session} {attempts}".encode()) / 2**32
    return min(_LONGEST_RETRY_S, _RETRY_S * 2.0 ** max(0, attempts - 1)) * (0.5 + share)
