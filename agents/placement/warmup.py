"""The check step of layers that were just loaded: checks that their output is finite, and measures times for the planner."""

import time

import numpy as np
import numpy.typing as npt

from meshd.agents.placement.resident import ResidentLayers
from meshd.errors import ModelFileError
from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv import BlockTable, KVPool

_PREFILL_TOKENS = 32
_DECODE_STEPS = 16
_COMPARED = 4
"""Number of tokens that are also computed alone, to compare their bits with the result in a batch."""


def warm_up(resident: ResidentLayers) -> None:
    """Prefill and decode a few tokens, and set the times and `steady` of `resident`. Runs on the compute thread.

    Each time is the minimum of several runs: in the first run the backend still builds some objects, and other work on the device
    can only make a run slower.

    Raises: ModelFileError if the output is not finite; OutOfMemory.
    """
    assert resident.weights is not None
    assert resident.pool is not None
    stage, pool = resident.weights.stage(resident.layers), resident.pool
    table = pool.allocate(_PREFILL_TOKENS + _DECODE_STEPS)
    try:
        hidden = _hidden(resident, stage, _PREFILL_TOKENS)
        together, _ = _run(stage, pool, hidden, table, 0)
        resident.steady = _is_steady(stage, pool, hidden, table, together)
        prefill_s = min(_run(stage, pool, hidden, table, 0)[1] for _ in range(3))
        resident.layer_prefill_s = prefill_s / (_PREFILL_TOKENS * len(resident.layers))
        times, out = [], hidden
        for step in range(_DECODE_STEPS):
            out, seconds = _run(stage, pool, hidden[step : step + 1], table, _PREFILL_TOKENS + step)
            times.append(seconds)
        _check_finite(resident, out)
        resident.layer_decode_s = min(times) / len(resident.layers)
        if resident.layers.end == resident.card.spec.layers:
            resident.head_s = _time_head(resident, stage, out)
    finally:
        pool.free(table)


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
    return min(times)


def _check_finite(resident: ResidentLayers, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise ModelFileError(
            f"layers {resident.layers} of {resident.card.name} compute values that are not finite: the weights are broken"
        )
