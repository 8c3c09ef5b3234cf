"""Moves running sessions to other peers: copies their KV while they decode, then changes the plan between two tokens.

The change of plan is a recovery in which nothing was lost (`agents.session.session`). The source keeps its KV until the new epoch
runs, so the source goes on serving if the move fails before that. Copying in rounds while the source decodes follows Llumnix
(https://arxiv.org/abs/2406.03243).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger

from meshd.agents.service import MeshOptions
from meshd.agents.session.answer import Answer
from meshd.agents.session.plan.resume import changed_numerics
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.agents.session.plan.route import Router
from meshd.agents.session.recovery_history import Recovered
from meshd.agents.session.session import SessionState
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError, NoPeer, PeerFault
from meshd.protocol.messages import Mirrored
from meshd.types import Advert, LayerRange, PeerId, Plan, SessionId

log = getLogger(__name__)

_COPY_S = 120.0
"""Time limit for copying the KV."""
_CHANGE_S = 15.0
"""Time limit for the first token under the new plan."""
_RETRY_S = 5.0
"""Time after a failed move before the same answer may be moved again."""
_CAUGHT_UP_TOKENS = 4
"""A copy that lacks at most this many positions counts as complete. The missing positions are copied during the last step, or
computed again."""
_LAST_STEP_S = 5.0
"""Time limit for the last token under the old plan."""
_LEAST_REMAINING = 32
"""An answer with fewer tokens left before `max_tokens` is not worth moving."""


@dataclass(slots=True)
class _Copy:
    """A copy of one stage's KV that is being made at a target peer."""

    stage: int
    target: PeerId
    caught_up: bool = False
    error: str = ""


@dataclass(slots=True)
class Mover:
    """Moves the answers that this peer coordinates."""

    retrier: PlanRetrier
    router: Router
    adverts: Callable[[], list[Advert]]
    clock: Clock
    _moving: dict[SessionId, list[_Copy]] = field(default_factory=dict)
    _seen: dict[SessionId, int] = field(default_factory=dict)
    """Session -> hash of all adverts' `_summary` at the last search for a better plan."""
    _searching: set[SessionId] = field(default_factory=set)
    _not_before: dict[SessionId, float] = field(default_factory=dict)
    """Session whose move failed -> time when it may be moved again."""

    async def move(self, answer: Answer, target: PeerId, source: PeerId | None) -> tuple[float, Plan]:
        """Move all stages, or those at `source`, to `target`.

        Returns: the pause in seconds, and the plan under which the answer continued.
        Raises: InvalidRequest, NoPeer, PeerFault.
        """
        if answer.plan is None or answer.machine.state not in (SessionState.PREFILLING, SessionState.DECODING):
            raise InvalidRequest(f"session {answer.session} is {answer.machine.state.value}: only a running one can move")
        plan = self.router.with_target(answer.card, answer.plan, target, source)
        return await self.change(answer, answer.plan, plan, f"moved to {answer.context.names(target)}"), plan

    async def change(self, answer: Answer, old: Plan, plan: Plan, reason: str) -> float:
        """Change the plan of an answer that runs under `old`.

        Returns: the pause in seconds.
        Raises: InvalidRequest, PeerFault. The answer then continues under the old plan, or another one if the new plan failed.
        """
        if answer.session in self._moving:
            raise InvalidRequest(f"session {answer.session} is being moved already")
        if answer.plan is not old:
            raise PeerFault("its plan changed for another reason meanwhile", hint="try again")
        epoch = answer.machine.epoch
        copies = self._moving[answer.session] = _copies(old, plan)
        try:
            answer.context.story.note(answer.session, "move begins", reason=reason, copies=len(copies))
            await self._copy(answer, old, epoch, copies)
            await self._end_step(answer, epoch)
            if answer.machine.epoch != epoch or answer.machine.state is not SessionState.DECODING:
                raise PeerFault("its plan changed for another reason meanwhile", hint="try again")
            answer.planned(plan, reason)
            return await self._first_token(answer, plan)
        finally:
            del self._moving[answer.session]
            if answer.machine.epoch == epoch:
                answer.hold(None)

    async def _copy(self, answer: Answer, old: Plan, epoch: int, copies: list[_Copy]) -> None:
        """Copy KV until every copy has caught up or failed. KV whose copy fails is computed again at the target."""
        for copy in copies:
            answer.machine.holders.add(copy.target)
            answer.tasks.spawn(self._request_copy(answer, epoch, old, copy))

        def ready() -> bool:
            copied = all(copy.caught_up or copy.error for copy in copies)
            return answer.machine.epoch != epoch or (copied and answer.machine.state is not SessionState.PREFILLING)

        await answer.output.until(ready, _COPY_S)

    async def _end_step(self, answer: Answer, epoch: int) -> None:
        """Wait for the token that is being computed. Let no later step start: the change of plan would discard its result."""
        if answer.machine.waits_for_client:
            return
        last = len(answer.machine.tokens) + 1
        answer.hold(last)
        machine = answer.machine
        await answer.output.until(lambda: machine.epoch != epoch or not answer.running or len(machine.tokens) >= last, _LAST_STEP_S)

    async def _request_copy(self, answer: Answer, epoch: int, plan: Plan, copy: _Copy) -> None:
        try:
            await answer.stages.mirror(epoch, plan, copy.stage, copy.target, eager=True)
        except MeshdError as error:
            copy.error = str(error)
            answer.output.touch()

    async def _first_token(self, answer: Answer, plan: Plan) -> float:
        epoch = answer.machine.epoch

        def done() -> list[Recovered]:
            return [change for change in answer.recoveries if change.epoch >= epoch]

        await answer.output.until(lambda: done() or not answer.running, _CHANGE_S)
        if answer.running and (changes := done()):
            if answer.plan is not None and answer.plan.id == plan.id:
                return changes[0].pause_s
            raise PeerFault(f"the move failed, and the session continues under another plan: {changes[0].reason}")
        if answer.machine.state is SessionState.FINISHED:
            return 0.0
        raise PeerFault(f"the move was not completed: the session ended, or made no token within {_CHANGE_S:.0f} s")

    def on_mirrored(self, answer: Answer, message: Mirrored) -> None:
        """Record a stage's report of a copy's progress."""
        for copy in self._moving.get(answer.session, ()):
            if (copy.stage, copy.target) == (message.stage, message.target):
                copy.error = message.error
                copy.caught_up = message.filled - message.held <= _CAUGHT_UP_TOKENS
                answer.output.touch()

    def rebalance(self, answers: list[Answer]) -> None:
        """Move answers away from peers that leave; after a change in the cluster, also to better plans. Called periodically."""
        if not answers:
            self._seen.clear()
            return
        adverts = self.adverts()
        draining = frozenset(advert.peer for advert in adverts if advert.draining)
        cluster = hash(tuple(sorted(_summary(advert) for advert in adverts)))
        self._seen = {answer.session: self._seen.get(answer.session, cluster) for answer in answers}
        now = self.clock.monotonic()
        self._not_before = {session: until for session, until in self._not_before.items() if until > now}
        for answer in answers:
            plan = answer.plan
            if plan is None or answer.machine.state is not SessionState.DECODING:
                continue
            if answer.session in self._searching or answer.session in self._not_before:
                continue
            if leaving := draining.intersection(plan.peers):
                self._start_once(answer, partial(self._move_away, answer, plan, leaving))
            elif self._seen[answer.session] != cluster:
                self._seen[answer.session] = cluster
                self._start_once(answer, partial(self._improve, answer, plan))

    async def _move_away(self, answer: Answer, plan: Plan, leaving: frozenset[PeerId]) -> None:
        new_plan = await self._plan_without(answer, plan, leaving)
        if leaving.intersection(new_plan.peers):
            raise NoPeer("no other peer can hold its layers")
        names = ", ".join(map(answer.context.names, sorted(leaving)))
        await self._change_and_log(answer, plan, new_plan, f"{names} leaves")

    async def _improve(self, answer: Answer, plan: Plan) -> None:
        if answer.record.max_tokens - len(answer.output.tokens) < _LEAST_REMAINING:
            return
        better = self.router.better(answer.card, answer.record.mesh, self.retrier.recovery_request(answer))
        if better is not None:
            await self._change_and_log(answer, plan, better.plan, "a better plan")

    async def _plan_without(self, answer: Answer, plan: Plan, leaving: frozenset[PeerId]) -> Plan:
        """Returns: the plan with each leaving peer replaced by one other peer, so that KV can be copied; if there is none with the
        same numerics, any plan without the leaving peers."""
        for source in sorted(leaving):
            others = [advert.peer for advert in self.adverts() if _may_take(advert, answer.record.mesh)]
            moved = [candidate for target in others if (candidate := self._with_target(answer, plan, target, source)) is not None]
            alike = [candidate for candidate in moved if candidate.numerics == plan.numerics]
            if not alike:
                found = await self.router.recover(
                    answer.card, answer.record.mesh, self.retrier.recovery_request(answer, avoid=leaving)
                )
                if not moved or not changed_numerics(plan, found.plan):
                    return found.plan
            plan = min(alike or moved, key=lambda plan: plan.predicted_tpot_s)
        return plan

    def _with_target(self, answer: Answer, plan: Plan, target: PeerId, source: PeerId) -> Plan | None:
        try:
            return self.router.with_target(answer.card, plan, target, source)
        except MeshdError:
            return None

    def _start_once(self, answer: Answer, work: Callable[[], Awaitable[None]]) -> None:
        """Start a move in a task, which is cancelled when the answer ends. The answer gets no other move until the task is done."""
        self._searching.add(answer.session)
        answer.tasks.spawn(self._log_failure(answer, work)).add_done_callback(lambda _: self._searching.discard(answer.session))

    async def _log_failure(self, answer: Answer, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except MeshdError as error:
            self._not_before[answer.session] = self.clock.monotonic() + _RETRY_S
            log.info("session %s was not moved: %s", answer.session, error)

    async def _change_and_log(self, answer: Answer, old: Plan, plan: Plan, reason: str) -> None:
        pause_s = await self.change(answer, old, plan, reason)
        log.info("session %s moved (%s), pause %.1f ms", answer.session, reason, 1000 * pause_s)


def _copies(old: Plan, new: Plan) -> list[_Copy]:
    """Returns: the copies that the new plan needs, one for each old stage and each new peer that runs a part of its layers."""
    copies: dict[tuple[int, PeerId], _Copy] = {}
    for stage in new.stages:
        for number, before in enumerate(old.stages):
            if stage.layers in before.layers and stage.peer != before.peer:
                copies.setdefault((number, stage.peer), _Copy(number, stage.peer))
    return list(copies.values())


def _may_take(advert: Advert, mesh: MeshOptions) -> bool:
    """Whether the peer may get stages: it is not draining, and the request allows it."""
    allowed = mesh.peers is None or advert.peer in mesh.peers
    return allowed and not advert.draining


def _summary(advert: Advert) -> tuple[str, bool, tuple[tuple[str, LayerRange, str], ...]]:
    """Returns: the parts of an advert that decide whether another plan may be better."""
    holdings = tuple(sorted((holding.model, holding.layers, holding.state) for holding in advert.holdings))
    return advert.peer, advert.draining, holdings
