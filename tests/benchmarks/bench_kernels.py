"""Measure how fast this device computes a model with each backend, thread count and context, and how much memory the weights take.

    python tests/benchmarks/bench_kernels.py [--model FILE.gguf] [--backend onnxruntime torch] [--threads 1 2] [--context 128 2048]

Without `--model`, the model has the shape of SmolLM2-135M and random weights. Each case prints one line. Decode times are medians
of single-token steps.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from meshd.kernels.backend import Segment, Stage, WeightSource
from meshd.kernels.measure import SyntheticWeights, measure
from meshd.kernels.registry import available_backends, make_backend
from meshd.kernels.sampling.sampler import Sampler
from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.types import LayerRange, ModelId, ModelSpec, SamplingParams
from tiny.kv import make_lease

SMOLLM2 = ModelSpec(
    architecture="llama",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    vocab=49152,
    context_length=8192,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tied_head=True,
)
CHUNK, STEPS = 128, 24


def open_model(path: Path | None) -> tuple[ModelSpec, WeightSource]:
    if path is None:
        return SMOLLM2, SyntheticWeights(SMOLLM2)
    file = GgufFile.open(path)
    return card_from_gguf(file, name=path.name, ref=f"file:{path}", model_id=ModelId("0" * 32)).spec, file


def bench_context(stage: Stage, spec: ModelSpec, context: int) -> str:
    lease, sampler = make_lease(spec, stage.layers, context + STEPS), Sampler(SamplingParams(temperature=0))
    ids = np.random.default_rng(0).integers(0, spec.vocab, context).astype(np.int32)
    started = time.perf_counter()
    for start in range(0, context, CHUNK):
        chunk = ids[start : start + CHUNK]
        hidden = stage.forward(stage.embed(chunk), [Segment(lease, start, len(chunk))])
    prefill = context / (time.perf_counter() - started)
    layers, head = [], []
    for step in range(STEPS):
        started = time.perf_counter()
        token, _ = sampler.pick(stage.logits(hidden[-1:])[0], context + step)
        head.append(time.perf_counter() - started)
        hidden = stage.forward(stage.embed(np.array([token], np.int32)), [Segment(lease, context + step, 1)])
        layers.append(time.perf_counter() - started - head[-1])
    layers_ms, head_ms = (1e3 * statistics.median(times[2:]) for times in (layers, head))
    decode = 1e3 / (layers_ms + head_ms)
    parts = f"layers {layers_ms:.2f} ms, head and sampler {head_ms:.2f} ms"
    return f"prefill {prefill:6.0f} tok/s  decode {decode:6.1f} tok/s ({parts})"


def bench(name: str, threads: int, spec: ModelSpec, weights: WeightSource, contexts: list[int]) -> None:
    backend, process = make_backend(name, threads), psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    loaded = backend.load(spec, LayerRange(0, spec.layers), weights, embedding=True, head=True)
    load_s, grown_mb = time.perf_counter() - started, (process.memory_info().rss - before) / 1e6
    weights_mb = loaded.weight_bytes / 1e6
    print(f"{name} {threads} threads: loaded in {load_s:.1f} s, weights {weights_mb:.0f} MB, process grew {grown_mb:.0f} MB")
    for context in contexts:
        print(f"  context {context:5d}: {bench_context(loaded.stage(loaded.layers), spec, context)}", flush=True)
    loaded.close()
    rates = measure(name, threads, 2.0)
    print(
        f"  probe: decode {rates.decode_bytes_s / 1e9:.2f} GB/s, prefill {rates.prefill_flops_s / 1e9:.0f} GFLOP/s, memory "
        f"{rates.memory_bytes_s / 1e9:.1f} GB/s, attention {rates.attention_bytes_s / 1e9:.2f} GB/s, "
        f"a layer's calls {rates.layer_overhead_s * 1e6:.0f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--backend", nargs="+", default=list(available_backends()))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, psutil.cpu_count(logical=False) or 1])
    parser.add_argument("--context", nargs="+", type=int, default=[128, 2048])
    options = parser.parse_args()
    spec, weights = open_model(options.model)
    for name in options.backend:
        for threads in dict.fromkeys(options.threads):
            bench(name, threads, spec, weights, options.context)


if __name__ == "__main__":
    main()
