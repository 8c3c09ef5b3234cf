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
"""A peer that is silent for this long has missed two heartbeats. If no token arrives either, the peer counts as lost."""
_QUIET_S = 0.4
"""A silent peer is tolerated while the latest token is younger than this."""
_LEAST_STEP_S = 3.0
"""The stages are not asked for their progress earlier than this after the last token: a peer may be busy with other sessions."""
_PATIENCE = 20.0
"""The stages are not asked for their progress before this many times the predicted time of the next token has passed."""
_HARD_STEP_S = 60.0
"""After this time without a token, a stage with an unfinished step counts as stuck, even if other sessions keep its peer busy."""
_ASK_S = 1.0
_BETWEEN_ASKS_S = 0.3
_REST_S = 1.0
"""Pause after a check that found nothing stuck."""
_UNREAD_S = 30.0
"""An answer without a reader is suspended after this time, unless it is a background answer."""


@dataclass(frozen=True, slots=True)
class StageWhereabouts:
    """A stage's report of how far a session has come."""

    due: int
    """The next position that the stage expects."""
    sent: int
    """Number of positions whose outputs the stage has sent to the next stage."""
    computing_s: float
    """How long the stage's peer has been computing its present step, which may be another session's."""


@dataclass(slots=True)
class StallWatch:
    """Checks the running answers of this peer. The coordinator calls `check` several times a second for each."""

    links: Links
    clock: Clock
    me: PeerId
    _asking: set[SessionId] = field(default_factory=set)

    def check(self, answer: Answer, now: float) -> None:
        """Renew an answer's leases. Suspend it if it has no reader; recover it if a peer is silent or no token arrives in time."""
        answer.renew(now)
        if answer.record.background:
            answer.read_all()  # without readers, nothing else would extend its credit
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
        """Returns: a peer of the plan that is linked but has been silent for too long; None if there is none."""
        assert answer.plan is not None
        opening = answer.machine.state is SessionState.OPENING
        for number, stage in enumerate(answer.plan.stages):
            if stage.peer == self.me or (opening and number in answer.machine.opened):
                continue
            if SILENT_S < self.links.silence_s(stage.peer) < float("inf"):
                return stage.peer
        return None

    async def _locate_stall(self, answer: Answer, limit: float) -> None:
        """Ask every stage for its progress twice. Recover the answer if a stage does not reply or no stage has made progress."""
        epoch, progress = answer.machine.epoch, answer.progress_at
        before = await self._ask(answer, epoch)
        await self.clock.sleep(_BETWEEN_ASKS_S)
        after = await self._ask(answer, epoch) if isinstance(before, list) else before
        if answer.machine.epoch != epoch or answer.progress_at != progress or answer.plan is None:
            return
        if not isinstance(after, list):
            answer.overdue(f"{answer.context.names(after)} does not answer", after)
            return
        assert isinstance(before, list)
        waited_s = self.clock.monotonic() - progress
        found = stuck_at(before, after, answer.machine.known, limit_s=limit if waited_s < _HARD_STEP_S else 0.0)
        if found is None:
            await self.clock.sleep(_REST_S)
            return
        reason, stage = found
        blame = answer.plan.stages[stage].peer if stage is not None else None
        answer.overdue(f"{waited_s:.1f} s without a token: {reason}", blame)

    async def _ask(self, answer: Answer, epoch: int) -> list[StageWhereabouts] | PeerId:
        """Returns: each stage's report, in order, or the peer that did not send one."""
        assert answer.plan is not None
        replies: dict[int, StageWhereabouts] = {}
        for peer in dict.fromkeys(answer.plan.peers):
            request = FetchProgress(request=self.links.next_request(), session=answer.session, epoch=epoch)
            try:
                reply, _ = await self.links.request(peer, request, timeout_s=_ASK_S)
            except MeshdError:
                return peer
            if isinstance(reply, ProgressData):
                replies |= {stage: StageWhereabouts(due, sent, computing) for stage, due, sent, computing in reply.stages}
        missing = [number for number in range(len(answer.plan.stages)) if number not in replies]
        return answer.plan.stages[missing[0]].peer if missing else [replies[number] for number in sorted(replies)]


def stuck_at(
    before: Sequence[StageWhereabouts], after: Sequence[StageWhereabouts], known: int, *, limit_s: float
) -> tuple[str, int | None] | None:
    """Find where a session is stuck, from two reports of each of its stages.

    known: number of tokens of prompt and answer that the coordinator has.
    limit_s: how long a stage's peer may compute one step.
    Returns: (reason, number of the stage at fault if it is known). None if a stage has made progress, or may still be computing.
    """
    if [(stage.due, stage.sent) for stage in before] != [(stage.due, stage.sent) for stage in after]:
        return None
    for number, stage in enumerate(after):
        if stage.sent < stage.due:
            stuck = stage.computing_s >= limit_s
            return (f"the peer of stage {number} has computed one step for {stage.computing_s:.1f} s", number) if stuck else None
        if number and stage.due < after[number - 1].sent:
            return f"a step from stage {number - 1} did not reach stage {number}", number
    if after[-1].sent >= known:
        return "the token of the last stage did not arrive", len(after) - 1
    return "every stage is idle", None
