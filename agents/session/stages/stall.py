"""Finds answers that are stuck, and the cause: a silent peer, a step lost in transit, or a stage that never finishes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.agents.links.links import Links
from meshd.agents.session.answer import Answer
from meshd.agents.session.session import SessionState
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import FetchProgress, ProgressData
from meshd.types import PeerId, SessionId

SILENT_S = 1.2
"""Two heartbeats missed: with no token either, the peer is not waited for."""
_QUIET_S = 0.4
"""A token that came less than this ago: the pipeline runs, whatever the heartbeats say."""
_LEAST_STEP_S = 3.0
"""A step may take this long before anybody asks where it is, however fast it was predicted: the peer may be busy with others."""
_PATIENCE = 20.0
"""And this many times its prediction."""
_HARD_STEP_S = 60.0
"""A stage that has had a step for this long, busy with others or not, does not make it any more."""
_ASK_S = 1.0
_AGAIN_S = 0.3
_REST_S = 1.0
"""After a look that found nothing stuck."""
_UNREAD_S = 30.0
"""An answer that nobody reads, and that is no background one, is suspended after this."""


@dataclass(frozen=True, slots=True)
class StageWhereabouts:
    """A stage's report of how far a session has come."""

    due: int
    """Position that it expects next."""
    sent: int
    """Positions that it has sent on."""
    computing_s: float
    """How long its peer has been computing its present step, which may be another session's."""


@dataclass(slots=True)
class StallWatch:
    """Looks at every answer of this peer, several times a second."""

    links: Links
    clock: Clock
    me: PeerId
    _asking: set[SessionId] = field(default_factory=set)

    def look(self, answer: Answer, now: float) -> None:
        """Renew its leases, notice silence, act on deadlines."""
        answer.renew(now)
        if answer.record.background:
            answer.read_all()  # it continues whether it is read or not
        if not answer.readers and not answer.record.background and now - answer.unread_since > _UNREAD_S:
            answer.suspend()
        state = answer.machine.state
        plan = answer.plan
        if plan is None or state not in (SessionState.OPENING, SessionState.PREFILLING, SessionState.DECODING):
            return
        if answer.machine.waits_for_client and state is SessionState.DECODING:
            answer.progress_at = now
        silent = self._silent(answer)
        if silent is not None and now - answer.progress_at > _QUIET_S:
            answer.overdue(f"{answer.context.names(silent)} is silent", silent)
            return
        predicted = plan.predicted_tpot_s if state is SessionState.DECODING else plan.predicted_ttft_s
        limit = max(_LEAST_STEP_S, _PATIENCE * predicted)
        if now - answer.progress_at > limit and state is not SessionState.OPENING and answer.session not in self._asking:
            self._asking.add(answer.session)
            answer.tasks.spawn(self._locate_stall(answer, limit)).add_done_callback(lambda _: self._asking.discard(answer.session))

    def _silent(self, answer: Answer) -> PeerId | None:
        """A peer of the plan that is linked, but was not heard for too long."""
        assert answer.plan is not None
        waiting = answer.machine.state is SessionState.OPENING
        for number, stage in enumerate(answer.plan.stages):
            if stage.peer == self.me or (waiting and number in answer.machine.opened):
                continue
            if SILENT_S < self.links.silence_s(stage.peer) < float("inf"):
                return stage.peer
        return None

    async def _locate_stall(self, answer: Answer, limit: float) -> None:
        """Ask every stage twice. What has not moved in between is stuck."""
        epoch, progress = answer.machine.epoch, answer.progress_at
        before = await self._ask(answer, epoch)
        await self.clock.sleep(_AGAIN_S)
        after = await self._ask(answer, epoch) if isinstance(before, list) else before
        if answer.machine.epoch != epoch or answer.progress_at != progress or answer.plan is None:
            return
        if not isinstance(after, list):
            answer.overdue(f"{answer.context.names(after)} does not answer", after)
            return
        assert isinstance(before, list)
        late = self.clock.monotonic() - progress
        found = stuck_at(before, after, answer.machine.known, limit_s=limit if late < _HARD_STEP_S else 0.0)
        if found is None:
            await self.clock.sleep(_REST_S)
            return
        reason, stage = found
        blame = answer.plan.stages[stage].peer if stage is not None else None
        answer.overdue(f"{late:.1f} s without a token: {reason}", blame)

    async def _ask(self, answer: Answer, epoch: int) -> list[StageWhereabouts] | PeerId:
        """Returns: each stage's report, in order, or the peer that did not send one."""
        assert answer.plan is not None
        replies: dict[int, StageWhereabouts] = {}
        for peer in dict.fromkeys(answer.plan.peers):
            question = FetchProgress(request=self.links.next_request(), session=answer.session, epoch=epoch)
            try:
                reply, _ = await self.links.request(peer, question, timeout_s=_ASK_S)
            except MeshdError:
                return peer
            if isinstance(reply, ProgressData):
                replies |= {stage: StageWhereabouts(due, sent, computing) for stage, due, sent, computing in reply.stages}
        missing = [number for number in range(len(answer.plan.stages)) if number not in replies]
        return answer.plan.stages[missing[0]].peer if missing else [replies[number] for number in sorted(replies)]


def stuck_at(
    before: Sequence[StageWhereabouts], after: Sequence[StageWhereabouts], known: int, *, limit_s: float
) -> tuple[str, int | None] | None:
    """(why, the stage at fault if it is known), or None while something moves, or a stage is busy with a step for up to `limit_s`.

    `known`: tokens of prompt and answer that the coordinator has.
    """
    if [(where.due, where.sent) for where in before] != [(where.due, where.sent) for where in after]:
        return None
    for number, where in enumerate(after):
        if where.sent < where.due:
            stuck = where.computing_s >= limit_s
            return (f"stage {number}'s peer computes the same step for {where.computing_s:.1f} s", number) if stuck else None
        if number and where.due < after[number - 1].sent:
            return f"what stage {number - 1} sent did not reach stage {number}", number
    if after[-1].sent >= known:
        return "the last stage's token did not arrive", len(after) - 1
    return "no stage has anything to do", None
