"""The batches that wait at a cut, until the peers that hold a part of their KV have answered.

A batch has one owner: the compute thread while it computes (`StageRunner.job`), `ParkedBatches` while it waits. Everything here
runs on the event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from meshd.agents.stage.batch.compute import Cut
from meshd.agents.stage.batch.measure import BatchJob
from meshd.agents.stage.flow.session import StageState
from meshd.agents.stage.steps import ActiveStage
from meshd.clock import Clock
from meshd.errors import LocalFault, MeshdError, PeerLost
from meshd.kernels.attention.remote import check_part
from meshd.kernels.attention.tree import Part
from meshd.types import PeerId

MAX_PARKED = 4
"""Most batches that wait at once. Each keeps its hidden states and the queries that it has sent: 10 MB for 128 tokens of a model
with 4,096 wide hidden states. With two, one waits while the other computes; more help where waiting takes longer than computing."""
CUT_TIMEOUT_S = 5.0
"""An answer to a request takes a round trip and the attention of some layers' worth of keys: milliseconds. A holder that has not
answered by then is blamed as a stage that does not compute is."""

Parts = list[Part | None]


@dataclass(slots=True, eq=False)
class _Parked:
    """A batch that waits."""

    job: BatchJob
    cut: Cut
    since: float
    """Monotonic time at which its requests were sent."""
    parts: Parts
    """What has come back, by request."""
    missing: set[int]
    """Requests without an answer, of steps that are still computed."""


@dataclass(slots=True)
class ParkedBatches:
    """Sends the requests of cuts, and collects the answers. An answer that comes twice, late or for an ended session is ignored."""

    clock: Clock
    fail: Callable[[ActiveStage, MeshdError, PeerId], None]
    """Ends the stage of a session whose request was not answered right: (stage, error, the holder). Calls `end`."""
    ready: Callable[[], None]
    """Called when a batch has all its answers."""
    abandoned: Callable[[BatchJob, list[MeshdError]], None]
    """Takes a batch of which no step is computed any further, with the error of each."""
    waited: Callable[[float], None]
    """Counts the seconds from a batch's requests to its last answer."""
    _parked: list[_Parked] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether no further batch may come to a cut."""
        return len(self._parked) >= MAX_PARKED

    def park(self, job: BatchJob, cut: Cut) -> None:
        """Take a batch that has come to a cut, and send its requests."""
        job.cuts += 1
        parked = _Parked(job, cut, self.clock.monotonic(), [None] * len(cut), set(range(len(cut))))
        self._parked.append(parked)
        for active, *_ in job.batch:  # those that ended while the compute thread had the batch
            if active.machine.state is StageState.ENDED:
                self._drop(parked, active)
        for index, (number, request) in enumerate(cut):
            if index not in parked.missing:
                continue
            active = job.batch[number].active
            assert active.shards is not None
            try:
                active.shards.ask(request, partial(self._answered, parked, index))
            except MeshdError as error:
                self.fail(active, error, active.shards.holder_of(request.run))

    def take_ready(self) -> tuple[BatchJob, Parts] | None:
        """Hand over the oldest batch that has all its answers. Returns: None if there is none."""
        for parked in self._parked:
            if not parked.missing:
                self._parked.remove(parked)
                return parked.job, parked.parts
        return None

    @property
    def jobs(self) -> list[BatchJob]:
        """The batches that wait."""
        return [parked.job for parked in self._parked]

    def end(self, active: ActiveStage) -> None:
        """Compute no further for a stage that has ended. The other steps of its batch continue."""
        for parked in list(self._parked):
            self._drop(parked, active)

    def sweep(self) -> None:
        """Fail the sessions whose holders have not answered in time."""
        now = self.clock.monotonic()
        for parked in list(self._parked):
            if now - parked.since <= CUT_TIMEOUT_S:
                continue
            for index in sorted(parked.missing):
                if index in parked.missing:  # a session may have had several, and the first one has failed it
                    waited_s = now - parked.since
                    error = PeerLost(f"a peer that holds a part of the session's KV has not answered for {waited_s:.1f} s")
                    self._fail(parked, index, error)

    def _answered(self, parked: _Parked, index: int, answer: Part | MeshdError) -> None:
        if index not in parked.missing:
            return
        try:
            if isinstance(answer, MeshdError):
                raise answer
            check_part(parked.cut[index].request, answer)
        except MeshdError as error:
            self._fail(parked, index, error)
            return
        parked.parts[index] = answer
        self._arrived(parked, {index})

    def _fail(self, parked: _Parked, index: int, error: MeshdError) -> None:
        number, request = parked.cut[index]
        active = parked.job.batch[number].active
        assert active.shards is not None
        self.fail(active, error, active.shards.holder_of(request.run))

    def _arrived(self, parked: _Parked, indexes: set[int]) -> None:
        """Wait for these requests no longer."""
        parked.missing -= indexes
        if not parked.missing:
            self.waited(self.clock.monotonic() - parked.since)
            self.ready()

    def _drop(self, parked: _Parked, active: ActiveStage) -> None:
        """Compute no further for a stage that has ended. No effect on a batch of which nothing is computed any further."""
        if parked not in self._parked:
            return
        numbers = {number for number, part in enumerate(parked.job.batch) if part.active is active}
        if not numbers:
            return
        for number in numbers:
            parked.job.computation.drop(number, LocalFault(f"the stage has ended: {active.machine.reason}"))
        errors = parked.job.computation.dropped
        if errors is not None:
            parked.missing.clear()
            self._parked.remove(parked)
            self.abandoned(parked.job, errors)
            return
        dropped = {index for index in parked.missing if parked.cut[index].number in numbers}
        if dropped:
            self._arrived(parked, dropped)
