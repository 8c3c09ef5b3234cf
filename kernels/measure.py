"""Measures this device's rates with a backend, on layers of the Llama architecture with synthetic weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meshd.kernels.backend import Backend, LoadedLayers, Segment
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.memory import KvKey, layout_of
from meshd.kernels.registry import make_backend
from meshd.kernels.threads import Workers
from meshd.kernels.weights.load import F32
from meshd.tensors import ROPE_FACTORS, tensor_shape
from meshd.types import LayerRange, ModelId, ModelSpec, Tensor

CHUNK_TOKENS = 128
LONG_CONTEXT = 2048
SMALL_LAYERS, LARGE_LAYERS = 8, 2
BANDWIDTH_BYTES = 64 << 20
"""Bytes that each thread reads: more than the caches of most processors hold."""


@dataclass(frozen=True, slots=True)
class BackendRates:
    """Rates of one backend with one thread count. Bytes of weights are those in the model's file, not in memory."""

    decode_bytes_s: float
    prefill_flops_s: float
    memory_bytes_s: float
    attention_bytes_s: float
    layer_overhead_s: float


@dataclass(frozen=True, slots=True)
class SyntheticWeights:
    """A weight source with random Q4_1 matrices, and norms of ones."""

    spec: ModelSpec
    seed: int = 0

    def tensor(self, name: str) -> Tensor:
        shape = tensor_shape(self.spec, name)
        if len(shape) == 1:
            return Tensor(name, "F32", shape, memoryview(np.ones(shape, np.float32).tobytes()))
        rng = np.random.default_rng((self.seed, *name.encode()))
        return Tensor(name, "Q4_1", shape, memoryview(random_q4_1(rng, int(np.prod(shape)) // 32)))

    def __contains__(self, name: str) -> bool:
        return name not in ROPE_FACTORS


def random_q4_1(rng: np.random.Generator, blocks: int) -> bytes:
    """Make random Q4_1 blocks whose weights are between -0.1 and 0.1."""
    raw = rng.integers(0, 256, (blocks, 20), np.uint8)
    raw[:, :4] = np.array([0.0125, -0.1], np.float16).view(np.uint8)
    return raw.tobytes()


def measure(backend_name: str, threads: int, budget_s: float) -> BackendRates:
    """Measure a backend for about `budget_s` seconds, plus the time to load weights. Raises: ConfigError, OutOfMemory."""
    backend = make_backend(backend_name, threads)
    small = _TimedStage(backend, _spec(hidden=512, ffn=1536), SMALL_LAYERS)
    large = _TimedStage(backend, _spec(hidden=2048, ffn=5632), LARGE_LAYERS)
    reader = BandwidthReader(threads)
    try:
        workloads = [
            lambda: small.step(0, 1),
            lambda: large.step(0, 1),
            lambda: large.step(LONG_CONTEXT - 1, 1),
            lambda: large.step(0, CHUNK_TOKENS),
            reader.read,
        ]
        small_s, large_s, long_s, chunk_s, read_s = medians_s(workloads, budget_s)
    finally:
        small.close()
        large.close()
    small_s = small_s / SMALL_LAYERS
    large_s, long_s, chunk_s = (seconds / LARGE_LAYERS for seconds in (large_s, long_s, chunk_s))
    memory = reader.bytes / read_s
    # Noise may make the difference too small or negative, so it counts as at least half of the large step's time.
    decode = (large.layer_bytes - small.layer_bytes) / max(large_s - small_s, large_s / 2)
    attention_s = max(long_s - large_s, large.kv_bytes(LONG_CONTEXT) / memory)
    return BackendRates(
        decode_bytes_s=decode,
        prefill_flops_s=2 * large.layer_parameters * CHUNK_TOKENS / chunk_s,
        memory_bytes_s=memory,
        attention_bytes_s=large.kv_bytes(LONG_CONTEXT) / attention_s,
        layer_overhead_s=max(small_s - small.layer_bytes / decode, 0.0),
    )


class BandwidthReader:
    """Reads memory with several threads at once."""

    def __init__(self, threads: int) -> None:
        self._arrays = [np.ones(BANDWIDTH_BYTES // 4, np.float32) for _ in range(threads)]
        self._workers = Workers(threads)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def read(self) -> None:
        self._workers.map(np.max, self._arrays)


def medians_s(workloads: Sequence[Callable[[], object]], budget_s: float) -> list[float]:
    """Time workloads in turns, so that other load affects all of them alike: one warm-up round, then at least one timed round.

    Returns: the median time of each workload, in seconds.
    """
    times: list[list[float]] = [[] for _ in workloads]
    end = time.perf_counter() + budget_s
    for workload in workloads:
        workload()
    while not times[0] or time.perf_counter() < end:
        for workload, taken in zip(workloads, times, strict=True):
            start = time.perf_counter()
            workload()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


class _TimedStage:
    """A stage with synthetic weights and filled KV."""

    def __init__(self, backend: Backend, spec: ModelSpec, layers: int) -> None:
        self._spec = spec
        whole = LayerRange(0, layers)
        self._loaded: LoadedLayers = backend.load(spec, whole, SyntheticWeights(spec), embedding=False, head=False)
        self._stage = self._loaded.stage(whole)
        self._lease = HostArena(1 << 40).open(KvKey(ModelId(""), whole), layout_of(spec, whole), LONG_CONTEXT)
        filled: F32 = np.full((LONG_CONTEXT, spec.kv_heads, spec.head_dim), 0.5, np.float32)
        values = np.random.default_rng(0).standard_normal((CHUNK_TOKENS, spec.hidden), dtype=np.float32)
        self._hidden = self._stage.decode(values.data.cast("B"), "f32", CHUNK_TOKENS)
        for layer in whole:
            self._lease.write(layer, 0, filled, filled)

    @property
    def layer_parameters(self) -> int:
        spec = self._spec
        return spec.hidden * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads) + 3 * spec.hidden * spec.ffn

    @property
    def layer_bytes(self) -> int:
        return self.layer_parameters * 20 // 32

    def kv_bytes(self, tokens: int) -> int:
        return 8 * tokens * self._spec.kv_heads * self._spec.head_dim

    def step(self, start: int, tokens: int) -> None:
        """Compute all layers over `tokens` tokens, the first at position `start`."""
        segments = [Segment(self._lease, start, tokens)]
        self._stage.forward(self._stage.rows(self._hidden, 0, tokens), segments)

    def close(self) -> None:
        self._loaded.close()


def _spec(hidden: int, ffn: int) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        layers=16,
        hidden=hidden,
        heads=hidden // 64,
        kv_heads=hidden // 256,
        head_dim=64,
        ffn=ffn,
        vocab=32,
        context_length=LONG_CONTEXT,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=True,
    )
