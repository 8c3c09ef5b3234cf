"""The check of layers that were just loaded: their output is finite, and their times are measured for the planner.

It runs on the compute thread, one step at a time and behind all steps of sessions: a session waits for one such step at most.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.placement.ready.layer_times import LayerTimes
from meshd.agents.placement.resident import ResidentLayers
from meshd.clock import Clock
from meshd.errors import MeshdError, ModelFileError
from meshd.kernels.backend import Hidden, Segment, Stage
from meshd.kernels.kv.lease import ArenaLease
from meshd.kernels.sampling.sampler import PickRequest, Sampler
from meshd.types import SamplingParams

T = TypeVar("T")

_PREFILL_TOKENS = 32
_CHUNK_TOKENS = 64
"""Tokens of a prefill chunk: so many that it is bound by arithmetic, as one of an answer is, and half as long."""
_LONG_POSITION = 1024
"""Position at which attention is timed, if the share has room for it."""
_LEAST_LONG = 256
"""Attention is not timed before this position: its time would vanish among the others."""
_DECODE_STEPS, _LONG_STEPS, _HEAD_STEPS = 10, 5, 5
_PAUSE_S = 0.005
"""Pause before each timed step. In an answer other work runs between two steps, so that caches are colder than in a tight loop."""
_SLOW_PREFILL_S = 0.3
"""If the first prefill takes longer, larger ones are not timed, because running sessions wait for each step of this check."""
_CHEAP_PREFILL_S, _CHUNKS, _FEWER_CHUNKS = 0.05, 3, 2
"""Number of times that the larger ones are timed, if it takes less and otherwise. The very first run is longer than later ones."""
_AGREE = 1.1
"""Steps are repeated until the two shortest times differ by less than this factor, at most `_MOST_REPEATS` times as often as
planned: on a busy device, all of a few steps may have been disturbed."""
_MOST_REPEATS = 2
_COMPARED = 4
"""Number of tokens that are also computed alone, to compare their bits with the result in a batch."""
_KNOWN_WITHIN = 1.3
"""Times that were measured before are used again if the tokens computed alone take as long, within this factor."""


async def warm_up(resident: ResidentLayers, compute: ComputeQueue, clock: Clock, known: LayerTimes | None = None) -> bool:
    """Prefill and decode a few tokens, and set the times and `steady` of `resident`.

    A step is timed on the compute thread, where nothing else computes meanwhile. Each time is a low quartile: what runs on other
    threads only makes steps longer, such as a load that reads its weights. Work that stays is learned from real steps
    (`planner/model/learn.py`).

    known: the times that were measured when these layers were loaded before. None: there are none.
    Returns: whether the times were measured now. Otherwise `known` is still right.
    Raises: ModelFileError if the output is not finite; OutOfMemory.
    Cancel: the running step ends; its KV is freed after it.
    """
    assert resident.weights is not None
    assert resident.kv is not None
    stage = resident.weights.stage(resident.layers)
    room = min(_LONG_POSITION + _CHUNK_TOKENS, resident.kv_tokens_free, resident.card.spec.context_length)
    capacity = max(_PREFILL_TOKENS + _DECODE_STEPS, room)
    run = _Steps(stage, resident.kv.open(resident.layers, capacity, step_tokens=capacity), compute, clock)
    try:
        run.hidden = await run.call(lambda: _hidden(resident, stage, _CHUNK_TOKENS))
        together, first_s = await run.forward(0, _PREFILL_TOKENS)
        _check_finite(resident, run)
        resident.steady, alone_s = await _is_steady(run, together)
        if known is not None and _agree(alone_s, known.decode_s(_PREFILL_TOKENS, len(resident.layers)), _KNOWN_WITHIN):
            known.apply(resident)
            return False
        step_s = await run.undisturbed_s(_PREFILL_TOKENS, 1, _DECODE_STEPS)
        _check_finite(resident, run)
        last = stage.rows(run.out, len(run.out) - 1, len(run.out))
        await _measure(resident, run, room, step_s, first_s)
        if resident.layers.end == resident.card.spec.layers:
            resident.head_s = await _head_s(resident, run, last)
        return True
    finally:
        run.close()


@dataclass(slots=True)
class _Steps:
    """Runs steps of the layers that are checked, each a background job of its own."""

    stage: Stage
    lease: ArenaLease
    compute: ComputeQueue
    clock: Clock
    hidden: Hidden = ()
    """The input of all steps."""
    out: Hidden = ()
    """The output of the last step."""
    _abandoned: bool = False
    """Whether a job was left on the compute thread."""

    async def call(self, work: Callable[[], T]) -> T:
        """Run a job after all steps of sessions."""
        try:
            return await self.compute.call(work, background=True)
        except asyncio.CancelledError:
            self._abandoned = True
            raise

    async def forward(self, start: int, tokens: int, first: int = 0) -> tuple[Hidden, float]:
        """Compute `tokens` rows of the input, from row `first` on, at position `start`. Returns: output, and seconds."""
        rows, segments = (
            self.stage.rows(self.hidden, first, first + tokens),
            [Segment(lease=self.lease, start=start, tokens=tokens)],
        )
        self.out, seconds = await self.timed(lambda: self.stage.forward(rows, segments))
        return self.out, seconds

    async def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """Run a job as `call` does. Returns: its result, and the seconds that it took on the compute thread."""

        def run() -> tuple[T, float]:
            began = time.perf_counter()
            result = work()
            return result, time.perf_counter() - began

        return await self.call(run)

    async def undisturbed_s(self, start: int, tokens: int, runs: int) -> float:
        """Run a step several times. Returns: its undisturbed time in seconds."""

        async def step() -> float:
            return (await self.forward(start, tokens))[1]

        times: list[float] = []
        while len(times) < runs or (not _agree(min(times), sorted(times)[1], _AGREE) and len(times) < _MOST_REPEATS * runs):
            await self.clock.sleep(_PAUSE_S)
            times.append(await step())
        return _low_quartile(times)

    def close(self) -> None:
        """Free the KV, after the step that may still wait or run on the compute thread."""
        if self._abandoned:
            self.compute.submit(self.lease.forget, lambda _: None, lambda _: None, background=True)
        else:
            self.lease.forget()


def _low_quartile(times: list[float]) -> float:
    return sorted(times)[(len(times) - 1) // 4]


def _agree(one_s: float, other_s: float, within: float) -> bool:
    """Whether two times differ by less than a factor."""
    return max(one_s, other_s) <= within * min(one_s, other_s)


async def _measure(resident: ResidentLayers, run: _Steps, room: int, step_s: float, prefill_s: float) -> None:
    """Set the times of layers and of attention.

    room: number of positions that steps may use. step_s: a decode step at a short context. prefill_s: the first prefill.
    """
    chunks = _CHUNKS if prefill_s < _CHEAP_PREFILL_S else _FEWER_CHUNKS
    layers, long = len(resident.layers), min(_LONG_POSITION, room - _CHUNK_TOKENS)
    chunk = _CHUNK_TOKENS if prefill_s < _SLOW_PREFILL_S and room >= _CHUNK_TOKENS else _PREFILL_TOKENS
    chunk_s = await run.undisturbed_s(0, chunk, chunks if chunk == _CHUNK_TOKENS else 3)
    pairs = chunk * (chunk + 1) / 2
    resident.layer_decode_s = step_s / layers
    resident.layer_prefill_s = chunk_s / (chunk * layers)
    if long < _LEAST_LONG:
        return
    long_s = await run.undisturbed_s(long, 1, _LONG_STEPS)
    if long_s > step_s:
        resident.attention_token_s = (long_s - step_s) / ((long - _PREFILL_TOKENS) * layers)
        resident.layer_decode_s -= resident.attention_token_s * _PREFILL_TOKENS
    if chunk < _CHUNK_TOKENS:
        return
    far_s = await run.undisturbed_s(long, chunk, chunks)
    if far_s > chunk_s:
        resident.attention_pair_s = (far_s - chunk_s) / (chunk * long * layers)
        resident.layer_prefill_s -= min(resident.attention_pair_s * pairs / chunk, resident.layer_prefill_s / 2)


async def _is_steady(run: _Steps, together: Hidden) -> tuple[bool, float]:
    """Compare the last tokens computed alone with their output in the batch (`together`).

    Returns: whether all bits are equal, and the seconds that the fastest of them took.
    """

    def bits(rows: Hidden, at: int) -> memoryview:
        return run.stage.encode(rows, "f32", at, at + 1)

    steady, times = True, []
    for at in range(_PREFILL_TOKENS - _COMPARED, _PREFILL_TOKENS):
        alone, seconds = await run.forward(at, 1, first=at)
        steady = steady and bits(alone, 0) == bits(together, at)
        times.append(seconds)
    return steady, min(times)


def _hidden(resident: ResidentLayers, stage: Stage, tokens: int) -> Hidden:
    """Make the layers' input: embedded tokens if they start at layer 0, random numbers otherwise."""
    spec = resident.card.spec
    if resident.layers.start == 0:
        return stage.embed(np.arange(tokens, dtype=np.int32) % spec.vocab)
    values = np.random.Generator(np.random.Philox(0)).standard_normal((tokens, spec.hidden), dtype=np.float32)
    return stage.decode(values.data.cast("B"), "f32", tokens)


async def _head_s(resident: ResidentLayers, run: _Steps, hidden: Hidden) -> float:
    """Time final norm, head and the pick of the likeliest token for one row. Returns: seconds."""
    times = []
    for _ in range(_HEAD_STEPS):
        request = PickRequest(Sampler(SamplingParams(temperature=0)), 0)
        (picked,), seconds = await run.timed(partial(run.stage.pick, hidden, [request]))
        if isinstance(picked, MeshdError):
            raise _broken(resident)
        times.append(seconds)
    return _low_quartile(times)


def _check_finite(resident: ResidentLayers, run: _Steps) -> None:
    if not run.stage.is_finite(run.out, 0, len(run.out)):
        raise _broken(resident)


def _broken(resident: ResidentLayers) -> ModelFileError:
    return ModelFileError(
        f"layers {resident.layers} of {resident.card.name} compute values that are not finite: the weights are broken"
    )
