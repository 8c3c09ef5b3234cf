"""Resources that a backend uses: memory for its weights, threads, and processor time while it is idle."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from meshd.kernels.backend import LoadedLayers, Segment
from meshd.kernels.kv import KVPool
from meshd.kernels.registry import available_backends
from tiny.llama import tiny_spec

_LOAD = """
import gc, json, sys
import psutil
from meshd.kernels.registry import make_backend
from meshd.kernels.measure import SyntheticWeights
from meshd.tensors import HELD_BITS, projections
from meshd.types import LayerRange, ModelSpec

spec = ModelSpec(architecture="llama", layers=4, hidden=2048, heads=32, kv_heads=4, head_dim=64, ffn=5632, vocab=64,
                 context_length=64, rope_theta=1e4, norm_eps=1e-5, tied_head=True)
backend, process = make_backend(sys.argv[1], int(sys.argv[2])), psutil.Process()
backend.load(spec, LayerRange(0, 1), SyntheticWeights(spec), embedding=False, head=False).close()
gc.collect()
before, threads = process.memory_info().rss, process.num_threads()
loaded = backend.load(spec, LayerRange(0, 4), SyntheticWeights(spec), embedding=False, head=False)
gc.collect()
held = process.memory_info().rss - before
more_threads, weights = process.num_threads() - threads, loaded.weight_bytes
loaded.close()
gc.collect()
left = process.memory_info().rss - before
planned = 4 * sum(rows * columns for rows, columns in projections(spec).values()) * HELD_BITS["Q4_1"] / 8
print(json.dumps({"planned": planned, "held": held, "left": left, "weights": weights, "threads": more_threads}))
"""


def load_in_a_process(name: str, threads: int) -> dict[str, int]:
    command = [sys.executable, "-c", _LOAD, name, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", available_backends())
def test_loaded_weights_take_their_size_once_and_are_freed(name: str) -> None:
    """A second copy would double `held`; float32 weights would make it six times as large. Plans count what onnxruntime needs."""
    used = load_in_a_process(name, threads=1)
    assert used["held"] < 1.1 * used["planned"]
    assert name != "onnxruntime" or used["held"] > 0.9 * used["planned"]
    assert used["held"] < 1.5 * used["weights"]
    assert used["left"] < 0.3 * used["weights"]
    assert used["threads"] == 0


def test_an_idle_backend_uses_no_processor_time(loaded: LoadedLayers) -> None:
    """Thread pools that keep spinning would slow down the other daemons of this machine."""
    stage, pool = loaded.stage(loaded.layers), KVPool(tiny_spec(), loaded.layers, blocks=2)
    table = pool.allocate(40)
    hidden = stage.embed(np.arange(8, dtype=np.int32))
    for _ in range(5):
        stage.forward(hidden, [Segment(table, 0, 8)], pool)
    before, started = time.process_time(), time.monotonic()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.2 * (time.monotonic() - started)


def test_a_step_starts_no_threads(loaded: LoadedLayers) -> None:
    stage, pool = loaded.stage(loaded.layers), KVPool(tiny_spec(), loaded.layers, blocks=2)
    table, hidden = pool.allocate(40), stage.embed(np.arange(8, dtype=np.int32))
    stage.forward(hidden, [Segment(table, 0, 8)], pool)
    before = psutil.Process().num_threads()
    for start in range(8, 20):
        stage.forward(hidden[:1], [Segment(table, start, 1)], pool)
    assert psutil.Process().num_threads() <= before
