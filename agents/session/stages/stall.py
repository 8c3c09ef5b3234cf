"""Finds answers that are stuck, and the cause: a silent peer, a step lost in transit, or a stage that never finishes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.agents.links.links import Links
from meshd.agents.session.answer import Answer
from meshd.agents.session.session import SessionState
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import FetchProgress, ProgressData, RunningStep, StageProgress
from meshd.types import PeerId, SessionId

SILENT_S = 1.2
"""A peer that is silent for this long has missed two heartbeats. If no token arrives either, the peer counts as lost."""
_QUIET_S = 0.4
"""A silent peer is tolerated while the latest token is younger than this."""
_LEAST_STEP_S = 3.0
"""No step counts as overdue earlier than this, and no lane as stuck."""
_PATIENCE = 20.0
"""A step is overdue after this many times its predicted time."""
_OTHER_WORK_S = 120.0
"""A peer may compute something that belongs to no session for this long: it measures layers that it has just loaded."""
_ASK_S = 1.0
_BETWEEN_ASKS_S = 0.3
_REST_S = 1.0
"""Pause after a check that found nothing stuck."""
_UNREAD_S = 30.0
"""An answer without a reader is suspended after this time, unless it is a background answer."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """What the peer of one stage of a session reports: how far the stage has come, and what the peer computes now."""

    progress: StageProgress
    running: RunningStep | None


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
        if answer.opened.done() and not answer.readers and not answer.record.background and now - answer.unread_since > _UNREAD_S:
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
        waited_s = now - answer.progress_at
        if waited_s > time_limit_s(predicted) and state is not SessionState.OPENING and answer.session not in self._asking:
            self._asking.add(answer.session)
            answer.tasks.spawn(self._locate_stall(answer)).add_done_callback(lambda _: self._asking.discard(answer.session))

    def _silent(self, answer: Answer) -> PeerId | None:
        """Returns: a peer of the plan that is linked but has been silent for too long; None if there is none."""
        assert answer.plan is not None
        opening = answer.machine.state is SessionState.OPENING
        for number, stage in enumerate(answer.plan.stages):
            if stage.peer == self.me or (opening and number in answer.machine.opened) or self.links.is_broken(stage.peer):
                continue
            if SILENT_S < self.links.silence_s(stage.peer) < float("inf"):
                return stage.peer
        return None

    async def _locate_stall(self, answer: Answer) -> None:
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
        prefilling = answer.machine.state is SessionState.PREFILLING
        found = stuck_at(before, after, answer.machine.known, answer.session, prefilling=prefilling)
        if found is None:
            await self.clock.sleep(_REST_S)
            return
        reason, stage = found
        blame = answer.plan.stages[stage].peer if stage is not None else None
        answer.overdue(f"{waited_s:.1f} s without a token: {reason}", blame)

    async def _ask(self, answer: Answer, epoch: int) -> list[StageReport] | PeerId:
        """Returns: each stage's report, in order, or the peer that did not send one."""
        assert answer.plan is not None
        replies: dict[int, StageReport] = {}
        for peer in dict.fromkeys(answer.plan.peers):
            request = FetchProgress(request=self.links.next_request(), session=answer.session, epoch=epoch)
            try:
                reply, _ = await self.links.request(peer, request, timeout_s=_ASK_S)
            except MeshdError:
                return peer
            if isinstance(reply, ProgressData):
                replies |= {progress.stage: StageReport(progress, reply.running) for progress in reply.stages}
        missing = [number for number in range(len(answer.plan.stages)) if number not in replies]
        return answer.plan.stages[missing[0]].peer if missing else [replies[number] for number in sorted(replies)]


def time_limit_s(predicted_s: float) -> float:
    """Returns: how long something may take that was predicted to take `predicted_s`."""
    return max(_LEAST_STEP_S, _PATIENCE * predicted_s)


def stuck_at(
    before: Sequence[StageReport], after: Sequence[StageReport], known: int, session: SessionId, *, prefilling: bool
) -> tuple[str, int | None] | None:
    """Find where a session is stuck, from two reports of each of its stages.

    A slow thing is not a dead thing: a step that waits in a queue, behind a step of another session or on a lane that carries
    something else is load. A peer is at fault only if the step that it computes is overdue by that step's own prediction.

    known: number of tokens of prompt and answer that the coordinator has.
    prefilling: whether the steps under way are prefill steps, which share their lane with other large messages.
    Returns: (reason, number of the stage at fault if it is known). None if a stage has made progress, or may still be computing.
    """
    if [_position(report) for report in before] != [_position(report) for report in after]:
        return None
    waiting = [number for number, report in enumerate(after) if report.progress.sent < report.progress.due]
    for number in waiting:
        running = after[number].running
        if running is not None and running.running_s > _limit_of(running):
            return _overdue(number, running, session), number
    if any(after[number].running is not None for number in waiting):
        return None
    due = known
    for number, report in enumerate(after):
        progress = report.progress
        if progress.due < due and prefilling and progress.idle_s < _LEAST_STEP_S:
            return None  # the step is on its way, behind other messages of its lane
        if progress.due < due:
            return (f"a step from stage {number - 1} did not reach stage {number}", number) if number else (_NO_STEP, None)
        due = progress.sent
    if due >= known:
        return "the token of the last stage did not arrive", len(after) - 1
    return "every stage is idle", None


_NO_STEP = "the next step did not reach stage 0"


def _position(report: StageReport) -> tuple[int, int]:
    return report.progress.due, report.progress.sent


def _limit_of(running: RunningStep) -> float:
    return time_limit_s(running.predicted_s) if running.session is not None else _OTHER_WORK_S


def _overdue(number: int, running: RunningStep, session: SessionId) -> str:
    whose = (
        ""
        if running.session == session
        else " of another session"
        if running.session is not None
        else " that belongs to no session"
    )
    return (
        f"the peer of stage {number} has computed one step{whose} for {running.running_s:.1f} s; "
        f"{running.predicted_s:.2f} s were predicted"
    )
