"""The check step of layers that were just loaded: checks that their output is finite, and measures times for the planner."""

import time

import numpy as np
import numpy.typing as npt

from meshd.agents.placement.resident import ResidentLayers
from meshd.errors import ModelFileError
from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv import BlockTable, KVPool

_PREFILL_TOKENS = 32
_CHUNK_TOKENS = 128
"""Tokens of a prefill chunk, as in an answer."""
_LONG_POSITION = 1024
"""Position at which attention is timed, if the pool has room for it."""
_LEAST_LONG = 256
"""Attention is not timed before this position: its time would vanish among the others."""
_DECODE_STEPS, _LONG_STEPS = 16, 6
_PAUSE_S = 0.005
"""Pause before each timed step. In an answer other work runs between two steps, so that caches are colder than in a tight loop."""
_SLOW_PREFILL_S = 0.3
"""If the first prefill takes longer, larger ones are not timed, because running sessions wait for this check step."""
_CHEAP_PREFILL_S, _CHUNKS, _FEWER_CHUNKS = 0.05, 3, 2
"""Number of times that the larger ones are timed, if it takes less and otherwise. The very first run is longer than later ones."""
_COMPARED = 4
"""Number of tokens that are also computed alone, to compare their bits with the result in a batch."""


def warm_up(resident: ResidentLayers) -> None:
    """Prefill and decode a few tokens, and set the times and `steady` of `resident`. Runs on the compute thread.

    Each time is a low quartile: other work only makes runs longer, such as other layers that load at the same time. Work that stays
    is learned from real steps (`planner/model/learn.py`).

    Raises: ModelFileError if the output is not finite; OutOfMemory.
    """
    assert resident.weights is not None
    assert resident.pool is not None
    stage, pool = resident.weights.stage(resident.layers), resident.pool
    room = min(_LONG_POSITION + _CHUNK_TOKENS, pool.blocks_free * pool.block_tokens, resident.card.spec.context_length)
    table = pool.allocate(max(_PREFILL_TOKENS + _DECODE_STEPS, room))
    try:
        hidden = _hidden(resident, stage, _CHUNK_TOKENS)
        together, first_s = _run(stage, pool, hidden[:_PREFILL_TOKENS], table, 0)
        resident.steady = _is_steady(stage, pool, hidden[:_PREFILL_TOKENS], table, together)
        run = _Timer(stage, pool, hidden, table, room)
        step_s, out = run.undisturbed_s(_PREFILL_TOKENS, 1, _DECODE_STEPS)
        _check_finite(resident, out)
        _set_times(resident, run, step_s, first_s)
        if resident.layers.end == resident.card.spec.layers:
            resident.head_s = _time_head(resident, stage, out)
    finally:
        pool.free(table)


class _Timer:
    """Times steps of the layers that are checked."""

    def __init__(self, stage: Stage, pool: KVPool, hidden: npt.NDArray[np.float32], table: BlockTable, room: int) -> None:
        self._stage, self._pool, self._hidden, self._table = stage, pool, hidden, table
        self.room = room
        """Number of positions that steps may use."""

    def undisturbed_s(self, start: int, tokens: int, runs: int) -> tuple[float, npt.NDArray[np.float32]]:
        """Run a step several times. Returns: its undisturbed time in seconds, and the output of the last run."""
        times = []
        for _ in range(runs):
            time.sleep(_PAUSE_S)
            out, seconds = _run(self._stage, self._pool, self._hidden[:tokens], self._table, start)
            times.append(seconds)
        return _low_quartile(times), out


def _low_quartile(times: list[float]) -> float:
    return sorted(times)[(len(times) - 1) // 4]


def _set_times(resident: ResidentLayers, run: _Timer, step_s: float, prefill_s: float) -> None:
    """Set the times of layers and of attention. `step_s`: a decode step at a short context. `prefill_s`: the first prefill."""
    chunks = _CHUNKS if prefill_s < _CHEAP_PREFILL_S else _FEWER_CHUNKS
    layers, long = len(resident.layers), min(_LONG_POSITION, run.room - _CHUNK_TOKENS)
    chunk = _CHUNK_TOKENS if prefill_s < _SLOW_PREFILL_S and run.room >= _CHUNK_TOKENS else _PREFILL_TOKENS
    chunk_s, _ = run.undisturbed_s(0, chunk, chunks if chunk == _CHUNK_TOKENS else 3)
    pairs = chunk * (chunk + 1) / 2
    resident.layer_decode_s = step_s / layers
    resident.layer_prefill_s = chunk_s / (chunk * layers)
    if long < _LEAST_LONG:
        return
    long_s, _ = run.undisturbed_s(long, 1, _LONG_STEPS)
    if long_s > step_s:
        resident.attention_token_s = (long_s - step_s) / ((long - _PREFILL_TOKENS) * layers)
        resident.layer_decode_s -= resident.attention_token_s * _PREFILL_TOKENS
    if chunk < _CHUNK_TOKENS:
        return
    far_s, _ = run.undisturbed_s(long, chunk, chunks)
    if far_s > chunk_s:
        resident.attention_pair_s = (far_s - chunk_s) / (chunk * long * layers)
        resident.layer_prefill_s -= min(resident.attention_pair_s * pairs / chunk, resident.layer_prefill_s / 2)


def _is_steady(
    stage: Stage, pool: KVPool, hidden: npt.NDArray[np.float32], table: BlockTable, together: npt.NDArray[np.float32]
) -> bool:
    """Compare the last tokens computed alone with their output in the batch (`together`). Returns: whether all bits are equal."""
    alone = range(len(hidden) - _COMPARED, len(hidden))
    return all((_run(stage, pool, hidden[at : at + 1], table, at)[0] == together[at]).all() for at in alone)


def _hidden(resident: ResidentLayers, stage: Stage, tokens: int) -> npt.NDArray[np.float32]:
    """Make the layers' input: embedded tokens if they start at layer 0, random numbers otherwise."""
    if resident.layers.start == 0:
        return stage.embed(np.arange(tokens, dtype=np.int32) % resident.card.spec.vocab)
    return np.random.Generator(np.random.Philox(0)).standard_normal((tokens, resident.card.spec.hidden), dtype=np.float32)


def _run(
    stage: Stage, pool: KVPool, hidden: npt.NDArray[np.float32], table: BlockTable, start: int
) -> tuple[npt.NDArray[np.float32], float]:
    """Run one step. Returns: its output, and the seconds that it took."""
    began = time.perf_counter()
    out = stage.forward(hidden, [Segment(table=table, start=start, tokens=len(hidden))], pool)
    return out, time.perf_counter() - began


def _time_head(resident: ResidentLayers, stage: Stage, hidden: npt.NDArray[np.float32]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        logits = stage.logits(hidden[-1:])
        times.append(time.perf_counter() - began)
    _check_finite(resident, logits)
    return _low_quartile(times)


def _check_finite(resident: ResidentLayers, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise ModelFileError(
            f"layers {resident.layers} of {resident.card.name} compute values that are not finite: the weights are broken"
        )
