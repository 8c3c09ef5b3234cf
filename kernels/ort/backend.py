"""The fast backend for CPUs: onnxruntime, with one onnxruntime session from each attention to the next.

Precision: weights keep the file's quantisation (4- or 8-bit codes, float32 scales). A product quantises its activations to int8 by
block, as llama.cpp does, and sums in float32. Everything else is float32. Results don't depend, bit for bit, on the split into
stages, on how tokens are grouped into chunks and batches, or on the number of threads. Tests check this on x86-64 with AVX-512.

Threads: each onnxruntime session has its own pool, whose idle threads spin for at most 0.1 ms (`SPIN_US`). Measured for
SmolLM2-135M on two cores, in ms per token without the head:

| spinning | one daemon, two threads | three daemons that share the layers |
|---|---|---|
| 0.1 ms | 12 | 14 |
| never | 15 | 16 |
| onnxruntime's default, 1 ms and more | 12 | 20 |
| process-wide pool, whose spinning can't be set from Python | 10 | 25 |
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from meshd.errors import LocalFault
from meshd.kernels.attention import LocalAttention
from meshd.kernels.backend import EXACT, F32, Positions, Progress, Projected, WeightSource
from meshd.kernels.forward import BaseStage
from meshd.kernels.ort.graph import (
    ACCURACY_F32,
    ACCURACY_INT8,
    Precision,
    Subgraph,
    expert_subgraph,
    head_part_count,
    head_subgraphs,
    mix_project_subgraph,
    mix_subgraph,
    product_subgraph,
    project_subgraph,
    route_subgraph,
)
from meshd.kernels.threads import Workers
from meshd.kernels.weights.heap import return_freed_memory
from meshd.kernels.weights.layers import NetworkWeights, Projection, mix_experts
from meshd.kernels.weights.matrices import BlockMatrix, unpack_codes
from meshd.types import LayerRange, ModelSpec, Tensor

SPIN_US = 100
"""Microseconds that an idle thread of an onnxruntime session's pool spins before it sleeps."""

TRIM_BYTES = 64 << 20
"""After packing this many bytes of weights, the heap is trimmed, since the unpacked weights are freed one at a time."""

SubgraphMaker = Callable[[NetworkWeights, int, Precision], Subgraph]


def open_session(subgraph: Subgraph, threads: int) -> ort.InferenceSession:
    """Open an onnxruntime session with its own packed copy of the weights, so that the subgraph can be freed."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # graph.py explains why
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = [ort.OrtValue.ortvalue_from_numpy_with_onnx_type(w.value, w.kind) for w in subgraph.weights.values()]
    options.add_external_initializers(list(subgraph.weights), values)
    return ort.InferenceSession(subgraph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@cache
def zero_points_work() -> bool:
    """Check by trial whether products with zero points are right on this processor. Takes about 10 ms.

    With AVX2 alone, products of a single token are wrong (https://github.com/microsoft/onnxruntime/issues/29853).
    """
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        codes = rng.integers(0, 256, (96, 8, 4 * bits), np.uint8)
        matrix = BlockMatrix(bits, 32, codes, np.full((96, 8), 0.01, np.float32), rng.random((96, 8), np.float32) - np.float32(0.5))
        x = rng.standard_normal((5, 256), dtype=np.float32)
        shifts = np.repeat(matrix.shift, 32, axis=1) if matrix.shift is not None else 0
        right = x @ ((unpack_codes(matrix).astype(np.float32) - matrix.zero) * np.float32(0.01) + shifts).T
        session = open_session(product_subgraph(Projection((matrix,)), Precision(ACCURACY_INT8, zero_points=True)), 1)
        for tokens in (1, 5):
            got = session.run(("y",), {"x": x[:tokens]})[0]
            if np.linalg.norm(got - right[:tokens]) > 0.05 * np.linalg.norm(right[:tokens]):
                return False
    return True


class OrtStage(BaseStage):
    """Layers as onnxruntime sessions: one before the first attention, one between every two attentions, one after the last.

    A layer with experts instead has one up to its attention, one for the router and one for each expert.
    """

    def __init__(self, loaded: "OrtLayers", layers: LayerRange, embedding: Tensor | None) -> None:
        super().__init__(loaded.spec, layers, embedding, loaded.attend)
        self._loaded = loaded
        loaded.prepare(layers)

    def project(self, hidden: F32, positions: Positions) -> Projected:
        layer = self._layers.start
        session = self._loaded.session(project_subgraph, layer)
        q, k, v = session.run(("q", "k", "v"), {"hidden": hidden, **self._rotation(layer, positions)})
        return self._projected(layer, q, k, v, hidden)

    def mix_project(self, layer: int, mixed: F32, residual: F32, positions: Positions) -> Projected:
        inputs = {"mixed": mixed.reshape(len(mixed), -1), "residual": residual}
        rotation = self._rotation(layer + 1, positions)
        if self._spec.experts:
            hidden = self._loaded.mix_with_experts(layer, inputs)
            q, k, v = self._loaded.session(project_subgraph, layer + 1).run(("q", "k", "v"), {"hidden": hidden, **rotation})
        else:
            session = self._loaded.session(mix_project_subgraph, layer)
            hidden, q, k, v = session.run(("hidden", "q", "k", "v"), inputs | rotation)
        return self._projected(layer + 1, q, k, v, hidden)

    def mix(self, mixed: F32, residual: F32) -> F32:
        inputs = {"mixed": mixed.reshape(len(mixed), -1), "residual": residual}
        if self._spec.experts:
            return self._loaded.mix_with_experts(self._layers.end - 1, inputs)
        hidden: F32 = self._loaded.session(mix_subgraph, self._layers.end - 1).run(("hidden",), inputs)[0]
        return hidden

    def logits(self, hidden: F32) -> F32:
        inputs = {"hidden": np.ascontiguousarray(hidden)}
        parts: list[F32] = [session.run(("logits",), inputs)[0] for session in self._loaded.head()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _rotation(self, layer: int, positions: Positions) -> dict[str, F32]:
        rope = self._loaded.ropes[layer]
        if rope is None:
            return {}
        cos, sin = rope.rows(positions)
        return {"cos": cos, "sin": sin}

    def _projected(self, layer: int, q: F32, k: F32, v: F32, residual: F32) -> Projected:
        q, k, v = (x.reshape(len(x), -1, self._spec.head_dim) for x in (q, k, v))
        return Projected(q, k, v, residual, self._loaded.rules[layer])


class OrtLayers:
    """The onnxruntime sessions of a range of layers.

    `open` opens the sessions that a stage over the whole range needs. A stage over a part of the range needs other sessions at its
    ends, which are opened when the first such stage is made.
    """

    def __init__(
        self, weights: NetworkWeights, layers: LayerRange, embedding: bool, workers: Workers, precision: Precision
    ) -> None:
        weights.check()
        self.spec = weights.spec
        self.ropes = weights.ropes()
        self.rules = {layer: weights.rule(layer) for layer in layers}
        self.attend = LocalAttention(workers)
        self._layers = layers
        self._workers = workers
        self._precision = precision
        self._weights = weights
        self._embedding = weights.embedding() if embedding else None
        self._sessions: dict[tuple[SubgraphMaker, int], ort.InferenceSession] = {}
        self._experts: dict[int, list[ort.InferenceSession]] = {}
        self._head: list[ort.InferenceSession] = []
        self._bytes = self._freed = 0
        self._closed = False

    @property
    def layers(self) -> LayerRange:
        return self._layers

    @property
    def weight_bytes(self) -> int:
        return self._bytes

    def open(self, head: bool, progress: Progress | None) -> None:
        """Open the sessions of all layers, and of the head if requested. Raises: ModelFileError."""
        parts = head_part_count(self.spec) if head else 0
        done, total = 0, len(self._layers) + 1 + parts

        def step() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done / total)

        self.prepare(self._layers, step)
        if head:
            for subgraph in head_subgraphs(self._weights, self._precision):
                self._head.append(self._open(subgraph))
                del subgraph  # frees its weights before the next subgraph is made
                step()
        return_freed_memory()

    def prepare(self, layers: LayerRange, step: Callable[[], None] = lambda: None) -> None:
        """Open the ONNX Runtime sessions that a stage over `layers` needs. Calls `step` `len(layers) + 1` times, for progress."""
        self.session(project_subgraph, layers.start)
        step()
        for layer in layers:
            last = layer == layers.end - 1
            if self.spec.experts:
                self._open_experts(layer)
                if not last:
                    self.session(project_subgraph, layer + 1)
            else:
                self.session(mix_subgraph if last else mix_project_subgraph, layer)
            step()

    def session(self, maker: SubgraphMaker, layer: int) -> ort.InferenceSession:
        """Return the session of the subgraph that `maker` makes for `layer`; open it on first use."""
        key = maker, layer
        if key not in self._sessions:
            self._sessions[key] = self._open(maker(self._weights, layer, self._precision))
        return self._sessions[key]

    def mix_with_experts(self, layer: int, inputs: dict[str, F32]) -> F32:
        """Compute a layer with experts after its attention. Returns: `[tokens, hidden]`."""
        hidden, normed, scores = self.session(route_subgraph, layer).run(("hidden", "normed", "scores"), inputs)
        experts = self._experts[layer]

        def expert(index: int, rows: F32) -> F32:
            out: F32 = experts[index].run(("hidden",), {"normed": rows})[0]
            return out

        out = mix_experts(normed, scores, self.spec.experts_used, expert, self._workers)
        result: F32 = hidden + out * np.float32(self.spec.residual_scale)
        return result

    def _open_experts(self, layer: int) -> None:
        """Open a session for the router and one for each expert. An expert uses one thread: several experts run in parallel."""
        if layer in self._experts:
            return
        self.session(route_subgraph, layer)
        made = (expert_subgraph(self.spec, expert, self._precision) for expert in self._weights.experts(layer))
        self._experts[layer] = [self._open(subgraph, 1) for subgraph in made]

    def head(self) -> list[ort.InferenceSession]:
        """Return the head's sessions, ordered by part of the vocabulary. Raises: LocalFault if the head was not loaded."""
        if not self._head:
            raise LocalFault(f"layers {self._layers} were loaded without the head")
        return self._head

    def stage(self, layers: LayerRange) -> OrtStage:
        if self._closed or layers not in self._layers:
            raise LocalFault(f"layers {layers} are not loaded: {'none' if self._closed else self._layers} are")
        return OrtStage(self, layers, self._embedding)

    def close(self) -> None:
        self._closed = True
        self._sessions.clear()
        self._experts.clear()
        self._head.clear()
        self._embedding = None
        self._bytes = 0
        return_freed_memory()

    def _open(self, subgraph: Subgraph, threads: int | None = None) -> ort.InferenceSession:
        self._bytes += subgraph.bytes
        self._freed += subgraph.bytes
        session = open_session(subgraph, threads or self._workers.threads)
        if self._freed > TRIM_BYTES:
            self._freed = 0
            return_freed_memory()
        return session


class OrtBackend:
    """onnxruntime on the CPU."""

    def __init__(self, threads: int, *, exact: bool = False) -> None:
        """With `exact`, products use float32 activations, which is several times slower."""
        self.name = f"onnxruntime{EXACT}" if exact else "onnxruntime"
        self.threads = threads
        self._precision = (
            Precision(ACCURACY_F32, zero_points=False) if exact else Precision(ACCURACY_INT8, zero_points=zero_points_work())
        )
        self._workers = Workers(threads)

    def load(
        self,
        spec: ModelSpec,
        layers: LayerRange,
        weights: WeightSource,
        *,
        embedding: bool,
        head: bool,
        progress: Progress | None = None,
    ) -> OrtLayers:
        loaded = OrtLayers(NetworkWeights(spec, weights), layers, embedding, self._workers, self._precision)
        loaded.open(head, progress)
        return loaded
