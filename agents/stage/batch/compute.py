"""Computes a batch: the steps of several sessions on the same layers, in one pass, which can pause.

Hidden states are handles here: only the functions of the stage look inside, and what leaves is encoded for the network, or tokens.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.steps import ActiveStage, StepInput
from meshd.errors import LocalFault, MeshdError, ProtocolViolation
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import AttendCut, AttendRequest, Done, Hidden, Pass, Segment, row_slices
from meshd.kernels.sampling.sampler import Picked, PickRequest
from meshd.kernels.wire import size_of
from meshd.protocol.messages import TokensFinish
from meshd.types import TokenLogprobs


@dataclass(slots=True)
class StepOutput:
    """The output of a step."""

    payload: memoryview | None = None
    """The hidden states for the next stage, encoded as the plan says."""
    tokens: tuple[int, ...] = ()
    """What the last stage sampled."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if the session asked for them."""
    finish: TokensFinish | None = None
    """Why the answer ends with the last of these tokens. None: the answer continues."""
    step_s: float = 0.0
    """The step's share of the time that the compute thread spent on its batch, with head and sampler, by its tokens."""


class BatchStep(NamedTuple):
    """One session's step in a batch."""

    active: ActiveStage
    step: StageStep
    since: float
    """Monotonic time since when the step could begin."""


class StepRequest(NamedTuple):
    """A part of a step's attention that another peer has to compute."""

    number: int
    """Number of the step in its batch."""
    request: AttendRequest


Outcome = StepOutput | MeshdError
Cut = tuple[StepRequest, ...]
"""What a batch waits for."""


class BatchComputation:
    """Computes the steps of a batch, which are of different sessions and of the same layers.

    One thread at a time may use it: the compute thread calls `run`, and the event loop `drop` while the batch waits at a cut.
    """

    def __init__(self, batch: Sequence[BatchStep]) -> None:
        self._batch = batch
        self._outcomes: list[Outcome | None] = [None] * len(batch)
        self._pass: Pass | None = None
        """The pass that is paused or runs."""
        self._places: list[int] = []
        """For each segment of the pass, the number of its step."""
        self._steps = self._compute(list(range(len(batch))))
        self.compute_s = 0.0
        """Seconds that `run` has taken so far."""

    def run(self, parts: Sequence[Part | None] = ()) -> Cut | list[Outcome]:
        """Compute up to the next cut or to the end. Runs on the compute thread.

        parts: what the last cut asked for, checked; None for steps that were dropped.
        Returns: a cut; or for each step its output, or why it failed: ProtocolViolation if its input is not finite, LocalFault if
        only its output is not.
        """
        started = time.perf_counter()
        if self._pass is not None:
            self._pass.give(parts)
        cut = next(self._steps, None)
        self.compute_s += time.perf_counter() - started
        return cut if cut is not None else self._ended()

    def drop(self, number: int, error: MeshdError) -> None:
        """Compute a step no further, while the batch waits at a cut. `error` becomes its outcome; the others don't change."""
        if self._outcomes[number] is None:
            self._outcomes[number] = error
            if self._pass is not None and number in self._places:
                self._pass.drop(self._places.index(number))

    @property
    def dropped(self) -> list[MeshdError] | None:
        """The errors of all steps, if none is computed any further; otherwise None."""
        errors = [outcome for outcome in self._outcomes if isinstance(outcome, MeshdError)]
        return errors if len(errors) == len(self._batch) else None

    def _ended(self) -> list[Outcome]:
        token_s = self.compute_s / sum(step.tokens for _, step, _ in self._batch)
        outcomes: list[Outcome] = []
        for (_, step, _), outcome in zip(self._batch, self._outcomes, strict=True):
            assert outcome is not None
            if isinstance(outcome, StepOutput):
                outcome.step_s = token_s * step.tokens
            outcomes.append(outcome)
        return outcomes

    def _compute(self, numbers: list[int]) -> Generator[Cut, None, None]:
        """Compute some of the steps in one pass, and set their outcomes."""
        batch = [self._batch[number] for number in numbers]
        inputs = [_input(active, step) for active, step, _ in batch]
        stage = batch[0].active.stage
        try:
            hidden = yield from self._pass_over(numbers, stage.join(inputs))
            picked = self._picked(numbers, hidden)
            outputs = [
                self._output(number, hidden, rows.start, rows.stop) for number, rows in zip(numbers, _rows(batch), strict=True)
            ]
        except MeshdError as error:
            self._pass = None
            if len(batch) == 1:
                self._outcomes[numbers[0]] = _blamed(error, batch[0].active, inputs[0])
                return
            # One session's fault must not end the others: computing a step again gives the same KV and the same output.
            for number in numbers:
                if self._outcomes[number] is None:
                    yield from self._compute([number])
            return
        for number, part, given, output in zip(numbers, batch, inputs, outputs, strict=True):
            if self._outcomes[number] is not None:
                continue
            tokens = picked.get(number, [])
            if isinstance(tokens, MeshdError):
                self._outcomes[number] = _blamed(tokens, part.active, given)
            else:
                _take(part, output, tokens)
                self._outcomes[number] = output

    def _pass_over(self, numbers: list[int], hidden: Hidden) -> Generator[Cut, None, Hidden]:
        """Compute the layers. Raises: LocalFault if KV is not finite."""
        batch = [self._batch[number] for number in numbers]
        segments = [Segment(active.cache.lease.kv, step.start, step.tokens, active.remote_runs) for active, step, _ in batch]
        running = self._pass = batch[0].active.stage.begin(hidden, segments)
        self._places = numbers
        while isinstance(found := running.run(), AttendCut):
            yield tuple(StepRequest(numbers[request.segment], request) for request in found.requests)
        assert isinstance(found, Done)
        self._pass = None
        return found.hidden

    def _output(self, number: int, hidden: Hidden, start: int, end: int) -> StepOutput:
        """Make the output of a step without its tokens. Raises: LocalFault if it is not finite."""
        active = self._batch[number].active
        if active.last or self._outcomes[number] is not None:
            return StepOutput()
        if not active.stage.is_finite(hidden, start, end):
            raise LocalFault(
                f"layers {active.stage.layers} computed hidden states that are not finite", hint="check the model file"
            )
        return StepOutput(active.stage.encode(hidden, active.open.plan.wire_dtype, start, end))

    def _picked(self, numbers: list[int], hidden: Hidden) -> dict[int, list[Picked] | MeshdError]:
        """Sample after the steps that ask for it. Returns: the tokens by number of the step."""
        batch = [self._batch[number] for number in numbers]
        stage = batch[0].active.stage
        if not batch[0].active.last:
            return {}
        sampled, rows = [], []
        for number, own, part in zip(numbers, _rows(batch), batch, strict=True):
            if part.step.sample and self._outcomes[number] is None:
                sampled.append(number)
                rows.append(stage.rows(hidden, own.stop - part.step.sample, own.stop))
        if not rows:
            return {}
        return dict(zip(sampled, stage.pick(stage.join(rows), [_request(self._batch[number]) for number in sampled]), strict=True))


def _rows(batch: Sequence[BatchStep]) -> list[slice]:
    return row_slices(step.tokens for _, step, _ in batch)


def _blamed(error: MeshdError, active: ActiveStage, hidden: Hidden) -> MeshdError:
    """Blame the sender of hidden states that are not finite.

    No layer turns NaN or infinity into a finite value, so the input is only checked if something fails.
    """
    if active.stage.is_finite(hidden, 0, len(hidden)):
        return error
    return ProtocolViolation("the hidden states received are not finite")


def _request(part: BatchStep) -> PickRequest:
    assert part.active.sampler is not None
    return PickRequest(part.active.sampler, part.step.sampled_from, part.step.ids[1:])


def _take(part: BatchStep, output: StepOutput, picked: Sequence[Picked]) -> None:
    """Put the picked tokens into a step's output, up to the one that ends the answer."""
    active, step, _ = part
    for offset, (token, logprobs) in enumerate(picked):
        output.tokens += (token,)
        if logprobs is not None:
            output.logprobs += (logprobs,)
        output.finish = _finish(active, token, step.sampled_from + offset - active.open.prompt_tokens)
        if output.finish:
            break


def _input(active: ActiveStage, step: StageStep) -> Hidden:
    """Embed the step's tokens, or decode its hidden states. A step that the first stage made has its ids itself."""
    data = step.data
    if not isinstance(data, StepInput):
        return active.stage.embed(np.asarray(step.ids, np.int32))
    if data.ids is not None:
        offset = step.start - data.start
        return active.stage.embed(data.ids[offset : offset + step.tokens])
    assert data.payload is not None
    dtype = active.open.plan.wire_dtype
    own = data.payload[: size_of(dtype, step.tokens, active.resident.card.spec.hidden)]  # guesses may have been cut off
    return active.stage.decode(own, dtype, step.tokens)


def _finish(active: ActiveStage, token: int, index: int) -> TokensFinish | None:
    """Why the answer ends with the token at `index`; None if the answer continues."""
    if token in active.resident.card.end_of_sequence and not active.open.ignore_eos:
        return TokensFinish.STOP
    return TokensFinish.LENGTH if index + 1 == active.open.max_tokens else None
