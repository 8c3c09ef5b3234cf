"""One step of one session, as the compute thread sees it, and which of the ready ones is next."""

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meshd.agents import stage_session as fsm
from meshd.agents.holdings import Load
from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv import BlockTable
from meshd.kernels.sampler import Sampler
from meshd.kernels.wire import decode
from meshd.protocol.messages import Activation, Open
from meshd.types import PeerId, SessionId, TokenLogprobs

_DECODES_PER_PREFILL = 8
"""Decodes that may go first before one waiting prefill step has its turn."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a step computes on: token ids at the first stage, an activation's bytes elsewhere."""

    ids: npt.NDArray[np.int32] | None
    activation: Activation | None = None
    payload: memoryview | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step made."""

    hidden: npt.NDArray[np.float32] | None
    token: int | None
    logprobs: TokenLogprobs | None
    ids: tuple[int, ...]
    compute_ns: int
    """Of this step so far, over all stages."""
    forward_s: float
    """Of this stage, without sampler and head."""
    stage_s: float
    """Of this stage, all of it."""


@dataclass(slots=True)
class Active:
    """A session's stage on this peer."""

    open: Open
    load: Load
    stage: Stage
    table: BlockTable
    sampler: Sampler
    machine: fsm.StageSession
    expires: float

    @property
    def key(self) -> tuple[SessionId, int]:
        return self.open.session, self.open.stage

    def peer_of(self, stage: int) -> PeerId:
        return self.open.plan.stages[stage].peer

    @property
    def last(self) -> bool:
        return self.open.stage == len(self.open.plan.stages) - 1


@dataclass(slots=True)
class StepQueue:
    """Steps that are ready: decodes first, then prefill, each first come first served.

    A session has one step here at most: the queue is as long as there are sessions, and each waits for one step of every other.
    """

    _decodes: deque[tuple[Active, fsm.Step]] = field(default_factory=deque)
    _prefills: deque[tuple[Active, fsm.Step]] = field(default_factory=deque)
    _decodes_in_row: int = 0

    def put(self, active: Active, step: fsm.Step) -> None:
        """A step that may be computed now."""
        (self._prefills if step.prefill else self._decodes).append((active, step))

    def take(self) -> tuple[Active, fsm.Step] | None:
        """The next one; prefill has its turn after some decodes, so that a new session is never starved by running ones."""
        if self._prefills and (not self._decodes or self._decodes_in_row >= _DECODES_PER_PREFILL):
            self._decodes_in_row = 0
            return self._prefills.popleft()
        if not self._decodes:
            return None
        self._decodes_in_row += 1
        return self._decodes.popleft()


def compute_step(active: Active, step: fsm.Step) -> StepOutput:
    """One step, on the compute thread."""
    started = time.perf_counter_ns()
    given = step.data
    assert isinstance(given, StepInput)
    ids: tuple[int, ...] = ()
    before_ns = 0
    if given.activation is not None and given.payload is not None:
        hidden = decode(given.payload, given.activation.dtype, given.activation.tokens, given.activation.hidden)
        ids, before_ns = given.activation.ids, given.activation.compute_ns
    else:
        assert given.ids is not None
        hidden = active.stage.embed(given.ids)
        if active.sampler.needs_prompt and step.prefill:
            ids = tuple(given.ids.tolist())
    assert active.load.pool is not None
    segment = Segment(table=active.table, start=step.position, tokens=step.tokens)
    hidden = active.stage.forward(hidden, [segment], active.load.pool)
    forward_s = (time.perf_counter_ns() - started) / 1e9
    token, logprobs = None, None
    if active.last:
        active.sampler.observe_prompt(ids)
        if step.sample:
            logits = active.stage.logits(hidden[-1:])[0]
            token, logprobs = active.sampler.pick(logits, step.position + step.tokens)
            active.sampler.accept(token)
    spent_ns = time.perf_counter_ns() - started
    return StepOutput(None if active.last else hidden, token, logprobs, ids, before_ns + spent_ns, forward_s, spent_ns / 1e9)
