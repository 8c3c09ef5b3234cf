"""Resources that a backend uses: memory for its weights, threads, and processor time while it is idle."""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

from meshd.kernels.backend import LoadedLayers, Segment
from meshd.kernels.registry import available_backends
from tiny.kv import make_lease
from tiny.llama import tiny_spec

_LOAD = """
import gc, json, sys
import psutil
from meshd.kernels.registry import make_backend
from meshd.kernels.measure import SyntheticWeights
from meshd.tensors import projections
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
planned = backend.memory_bytes({"Q4_1": 4 * sum(rows * columns for rows, columns in projections(spec).values())})
print(json.dumps({"planned": planned, "held": held, "left": left, "weights": weights, "threads": more_threads}))
"""

_KINDS = """
import gc, json, sys
import psutil
from meshd.kernels.registry import make_backend
from meshd.types import LayerRange, ModelSpec
from tiny.sized import SizedWeights

spec = ModelSpec(architecture="llama", layers=2, hidden=2048, heads=32, kv_heads=4, head_dim=64, ffn=2816, vocab=64,
                 context_length=64, rope_theta=1e4, norm_eps=1e-5, tied_head=True)
backend, process, found = make_backend(sys.argv[1], 1), psutil.Process(), {}
backend.load(spec, LayerRange(0, 1), SizedWeights(spec, "F32"), embedding=False, head=False).close()  # libraries grow once
gc.collect()
for kind in ("F32", "F16", "Q8_0", "Q4_K", "Q6_K", "MXFP4"):  # `test_footprint.py` has all kinds
    weights, grown = SizedWeights(spec, kind), []
    for layer in (0, 1):
        before = process.memory_info().rss
        loaded = backend.load(spec, LayerRange(layer, layer + 1), weights, embedding=False, head=False)
        gc.collect()
        grown.append(process.memory_info().rss - before)
        found[kind] = grown, loaded.weight_bytes, backend.memory_bytes(weights.counts(layer))
        loaded.close()
        gc.collect()
print(json.dumps(found))
"""


def run_in_a_process(code: str, *arguments: str) -> dict[str, Any]:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env={**os.environ, "PYTHONPATH": path})
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", available_backends())
def test_loaded_weights_take_their_size_once_and_are_freed(name: str) -> None:
    """A second copy would double `held`; float32 weights would make it six times as large."""
    used = run_in_a_process(_LOAD, name, "1")
    assert used["held"] == pytest.approx(used["planned"], rel=0.1)
    assert used["held"] == pytest.approx(used["weights"], rel=0.1)
    assert used["left"] < 0.3 * used["weights"]
    assert used["threads"] == 0


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-exact", "torch"])
def test_a_process_grows_by_what_its_backend_says_that_a_kind_of_weight_takes(name: str) -> None:
    """One of two loads may use memory again that was freed, or leave some that it needed only meanwhile."""
    for kind, (held, weight_bytes, predicted) in run_in_a_process(_KINDS, name).items():
        assert predicted == pytest.approx(weight_bytes, rel=0.01), kind
        assert any(predicted == pytest.approx(each, rel=0.1) for each in held), (kind, predicted, held)


def test_an_idle_backend_uses_no_processor_time(loaded: LoadedLayers) -> None:
    """Thread pools that keep spinning would slow down the other daemons of this machine."""
    stage, lease = loaded.stage(loaded.layers), make_lease(tiny_spec(), loaded.layers, 40)
    hidden = stage.embed(np.arange(8, dtype=np.int32))
    for _ in range(5):
        stage.forward(hidden, [Segment(lease, 0, 8)])
    before, started = time.process_time(), time.monotonic()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.2 * (time.monotonic() - started)


def test_a_step_starts_no_threads(loaded: LoadedLayers) -> None:
    stage, lease = loaded.stage(loaded.layers), make_lease(tiny_spec(), loaded.layers, 40)
    hidden = stage.embed(np.arange(8, dtype=np.int32))
    stage.forward(hidden, [Segment(lease, 0, 8)])
    before = psutil.Process().num_threads()
    for start in range(8, 20):
        stage.forward(hidden[:1], [Segment(lease, start, 1)])
    assert psutil.Process().num_threads() <= before
