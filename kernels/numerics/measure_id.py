"""Computes a backend's numerics id on this device.

Each fixed network is computed over rows 64, 8 and 1 at a time. The hash covers all results: hidden states, logits and the sampler's
weights. The rows of the three must also be equal to the last bit; if not, the id says that its bits vary (`meshd/numerics.py`).

The hash has no tolerance on purpose: a difference in one bit of one product can decide a near-tie between two tokens.
"""

import hashlib

import numpy as np

from meshd.kernels.attention.tree import SPAN_TOKENS
from meshd.kernels.backend import EXACT, F32, Backend, Hidden, LoadedLayers, Segment, Stage
from meshd.kernels.kv.memory import KvKey, layout_of
from meshd.kernels.numerics.fixed_networks import FixedNetwork, FixedWeights, fixed_networks
from meshd.kernels.sampling.candidates import weigh
from meshd.numerics import NumericsId, numerics_id
from meshd.types import LayerRange, ModelId

ROWS, FEW_ROWS = 64, 8
"""Rows of a step. 64 and 8 are on different sides of what libraries treat as a small product."""
_ARENA_BYTES = 1 << 26
"""For two leases at a time of 1,100 positions, of which the largest takes 5 MB."""


def measure_numerics(backend: Backend) -> NumericsId:
    """Compute the fixed networks. Raises: OutOfMemory."""
    digest, invariant = hashlib.sha256(), True
    for network in fixed_networks():
        results, same = compute(backend, network)
        invariant &= same
        for values in results:
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return numerics_id(
        backend.name.removesuffix(EXACT), backend.precision, SPAN_TOKENS, digest.hexdigest(), batch_invariant=invariant
    )


def compute(backend: Backend, network: FixedNetwork) -> tuple[list[F32], bool]:
    """Compute one network. Returns: its results, and whether the rows are equal however many are computed at a time."""
    layers = LayerRange(0, network.spec.layers)
    loaded = backend.load(network.spec, layers, FixedWeights(network), embedding=True, head=True)
    try:
        return _compute(backend, network, loaded)
    finally:
        loaded.close()


def _compute(backend: Backend, network: FixedNetwork, loaded: LoadedLayers) -> tuple[list[F32], bool]:
    spec, layers = network.spec, LayerRange(0, network.spec.layers)
    stage = loaded.stage(layers)
    lease = backend.arena(_ARENA_BYTES).open(KvKey(ModelId(""), layers), layout_of(spec, layers), network.tokens)
    try:
        hidden = stage.embed(np.arange(network.tokens, dtype=np.int32) % spec.vocab)

        def run(start: int, end: int, rows: int) -> Hidden:
            steps = [(at, min(at + rows, end)) for at in range(start, end, rows)]
            return stage.join([stage.forward(stage.rows(hidden, at, to), [Segment(lease, at, to - at)]) for at, to in steps])

        last, end = network.tokens - ROWS, network.tokens
        before = [_values(stage, run(0, last, ROWS))] if last else []
        whole = run(last, end, ROWS)
        many = _values(stage, whole)
        few = _values(stage, run(last, end, FEW_ROWS))
        alone = _values(stage, run(end - network.alone, end, 1))
        heads = _heads(stage, whole, network.alone)
        same = np.array_equal(many, few) and np.array_equal(many[-len(alone) :], alone) and _equal_rows(heads)
        weights = [weigh(row, float(row.max()), 0.75).values.copy() for row in heads[0][:FEW_ROWS]]
        return [*before, many, few, alone, *heads, *weights], same
    finally:
        lease.forget()


def _values(stage: Stage, hidden: Hidden) -> F32:
    """Copy hidden states to host memory: `[tokens * hidden]`."""
    return np.frombuffer(stage.encode(hidden, "f32", 0, len(hidden)), "<f4")


def _heads(stage: Stage, hidden: Hidden, alone: int) -> tuple[F32, F32, F32]:
    """Compute the logits of all rows at once, of a few at a time, and of the last ones alone."""
    rows = len(hidden)

    def logits(start: int, step: int) -> F32:
        return np.concatenate([stage.logits(stage.rows(hidden, at, at + step)) for at in range(start, rows, step)])

    return logits(0, rows), logits(0, FEW_ROWS), logits(rows - alone, 1)


def _equal_rows(heads: tuple[F32, F32, F32]) -> bool:
    many, few, alone = heads
    return np.array_equal(many, few) and np.array_equal(many[-len(alone) :], alone)
