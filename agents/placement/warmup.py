"""The check step of a fresh load: it must compute something finite, and how long it takes is what the planner will use."""

import time

import numpy as np
import numpy.typing as npt

from meshd.agents.placement.loads import ResidentLayers
from meshd.errors import ModelFileError
from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv import BlockTable, KVPool

_PREFILL_TOKENS = 32
_DECODE_STEPS = 16
_COMPARED = 4
"""Tokens that are computed by themselves too."""


def warm_up(load: ResidentLayers) -> None:
    """Prefill a few tokens and decode some more, on the compute thread; sets what is measured of the load.

    The first step pays for what backends build lazily, and whatever else the device does only ever adds to a time: so each is the
    least of several. Raises: ModelFileError if what comes out is not finite; OutOfMemory.
    """
    assert load.weights is not None
    assert load.pool is not None
    stage, pool = load.weights.stage(load.layers), load.pool
    table = pool.allocate(_PREFILL_TOKENS + _DECODE_STEPS)
    try:
        hidden = _hidden(load, stage, _PREFILL_TOKENS)
        together, _ = _run(stage, pool, hidden, table, 0)
        load.steady = _is_steady(stage, pool, hidden, table, together)
        prefill_s = min(_run(stage, pool, hidden, table, 0)[1] for _ in range(3))
        load.layer_prefill_s = prefill_s / (_PREFILL_TOKENS * len(load.layers))
        times, out = [], hidden
        for step in range(_DECODE_STEPS):
            out, seconds = _run(stage, pool, hidden[step : step + 1], table, _PREFILL_TOKENS + step)
            times.append(seconds)
        _check_finite(load, out)
        load.layer_decode_s = min(times) / len(load.layers)
        if load.layers.end == load.card.spec.layers:
            load.head_s = _head(load, stage, out)
    finally:
        pool.free(table)


def _is_steady(
    stage: Stage, pool: KVPool, hidden: npt.NDArray[np.float32], table: BlockTable, together: npt.NDArray[np.float32]
) -> bool:
    """Whether tokens have the same bits alone as among others."""
    alone = range(len(hidden) - _COMPARED, len(hidden))
    return all((_run(stage, pool, hidden[at : at + 1], table, at)[0] == together[at]).all() for at in alone)


def _hidden(load: ResidentLayers, stage: Stage, tokens: int) -> npt.NDArray[np.float32]:
    if load.layers.start == 0:
        return stage.embed(np.arange(tokens, dtype=np.int32) % load.card.spec.vocab)
    return np.random.Generator(np.random.Philox(0)).standard_normal((tokens, load.card.spec.hidden), dtype=np.float32)


def _run(
    stage: Stage, pool: KVPool, hidden: npt.NDArray[np.float32], table: BlockTable, start: int
) -> tuple[npt.NDArray[np.float32], float]:
    began = time.perf_counter()
    out = stage.forward(hidden, [Segment(table=table, start=start, tokens=len(hidden))], pool)
    return out, time.perf_counter() - began


def _head(load: ResidentLayers, stage: Stage, hidden: npt.NDArray[np.float32]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        logits = stage.logits(hidden[-1:])
        times.append(time.perf_counter() - began)
    _check_finite(load, logits)
    return min(times)


def _check_finite(load: ResidentLayers, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise ModelFileError(f"layers {load.layers} of {load.card.name} compute values that are not finite: the weights are broken")
