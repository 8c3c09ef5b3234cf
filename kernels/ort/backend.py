"""The fast backend for CPUs: onnxruntime, with one onnxruntime session from each attention to the next.

Precision: weights keep the file's quantisation (4- or 8-bit codes, float32 scales). A product quantises its activations to int8 by
block, as llama.cpp does, and sums in float32. Everything else is float32. Results don't depend, bit for bit, on the split into
stages, on how tokens are grouped into chunks and batches, or on the number of threads. Where a processor's kernels sum a single row
in another order, it is computed beside a copy of itself (`trials.py`). Tests check this on x86-64 with AVX-512 and with AVX2.

Threads: each onnxruntime session has its own pool, whose idle threads spin for at most 0.1 ms (`SPIN_US`). Measured for
SmolLM2-135M on two cores, in ms per token without the head:

| spinning | one daemon, two threads | three daemons that share the layers |
|---|---|---|
| 0.1 ms | 12 | 14 |
| never | 15 | 16 |
| onnxruntime's default, 1 ms and more | 12 | 20 |
| process-wide pool, whose spinning can't be set from Python | 10 | 25 |
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from weakref import WeakValueDictionary

import numpy as np

from meshd.errors import LocalFault
from meshd.kernels.attention.local import LocalAttention
from meshd.kernels.backend import EXACT, F32, Positions, Progress, Projected, WeightSource
from meshd.kernels.forward import BaseStage
from meshd.kernels.kv.arena import HostArena
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
    project_subgraph,
    route_subgraph,
)
from meshd.kernels.ort.session import OrtSession
from meshd.kernels.ort.trials import least_rows, zero_points_work
from meshd.kernels.threads import Workers
from meshd.kernels.weights.footprint import memory_bytes
from meshd.kernels.weights.heap import return_freed_memory
from meshd.kernels.weights.layers import NetworkWeights, mix_experts
from meshd.types import LayerRange, ModelSpec, Tensor

TRIM_BYTES = 64 << 20
"""After packing this many bytes of weights, the heap is trimmed, since the unpacked weights are freed one at a time."""

SubgraphMaker = Callable[[NetworkWeights, int, Precision], Subgraph]
Subkey = tuple[SubgraphMaker, int]
"""What makes a subgraph, and of which layer."""


class OrtStage(BaseStage):
    """Layers as onnxruntime sessions: one before the first attention, one between every two attentions, one after the last.

    A layer with experts instead has one up to its attention, one for the router and one for each expert.
    """

    def __init__(self, loaded: "OrtLayers", layers: LayerRange, embedding: Tensor | None) -> None:
        super().__init__(loaded.spec, layers, embedding, loaded.attend)
        self._loaded = loaded
        self._sessions = loaded.sessions_of(layers)
        """This stage's subgraphs. Those at its borders are freed with it, unless another stage has them too."""

    def project(self, hidden: F32, positions: Positions) -> Projected:
        layer = self._layers.start
        session = self._sessions[project_subgraph, layer]
        q, k, v = session.run(("q", "k", "v"), {"hidden": hidden, **self._rotation(layer, positions)})
        return self._projected(layer, q, k, v, hidden)

    def mix_project(self, layer: int, mixed: F32, residual: F32, positions: Positions) -> Projected:
        inputs = {"mixed": mixed.reshape(len(mixed), -1), "residual": residual}
        rotation = self._rotation(layer + 1, positions)
        if self._spec.experts:
            hidden = self._mix_with_experts(layer, inputs)
            q, k, v = self._sessions[project_subgraph, layer + 1].run(("q", "k", "v"), {"hidden": hidden, **rotation})
        else:
            session = self._sessions[mix_project_subgraph, layer]
            hidden, q, k, v = session.run(("hidden", "q", "k", "v"), inputs | rotation)
        return self._projected(layer + 1, q, k, v, hidden)

    def mix(self, mixed: F32, residual: F32) -> F32:
        inputs = {"mixed": mixed.reshape(len(mixed), -1), "residual": residual}
        if self._spec.experts:
            return self._mix_with_experts(self._layers.end - 1, inputs)
        hidden: F32 = self._sessions[mix_subgraph, self._layers.end - 1].run(("hidden",), inputs)[0]
        return hidden

    def head(self, hidden: F32) -> F32:
        inputs = {"hidden": np.ascontiguousarray(hidden)}
        parts: list[F32] = [session.run(("logits",), inputs)[0] for session in self._loaded.head()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _mix_with_experts(self, layer: int, inputs: dict[str, F32]) -> F32:
        """Compute a layer with experts after its attention. Returns: `[tokens, hidden]`."""
        hidden, normed, scores = self._sessions[route_subgraph, layer].run(("hidden", "normed", "scores"), inputs)
        result: F32 = hidden + self._loaded.mix_experts(layer, normed, scores) * np.float32(self._spec.residual_scale)
        return result

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
    borders, which only such stages keep alive.
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
        self._least_rows = least_rows(precision)
        self._weights = weights
        self._embedding = weights.embedding() if embedding else None
        self._open_sessions: WeakValueDictionary[Subkey, OrtSession] = WeakValueDictionary()
        self._whole: dict[Subkey, OrtSession] = {}
        """The sessions of a stage over the whole range."""
        self._experts: dict[int, list[OrtSession]] = {}
        self._head: list[OrtSession] = []
        self._freed = 0
        self._closed = False

    @property
    def layers(self) -> LayerRange:
        return self._layers

    @property
    def weight_bytes(self) -> int:
        experts = (session for sessions in self._experts.values() for session in sessions)
        return sum(session.bytes for session in (*list(self._open_sessions.values()), *experts, *self._head))

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        """See `LoadedLayers.border_bytes`. Between layers with experts, a stage needs nothing more."""
        if self.spec.experts:
            return 0
        starts = {part.start for part in parts} - {self._layers.start}
        ends = {part.end for part in parts} - {self._layers.end}
        weights = Counter[str]()
        for layer in starts:
            weights += self._weights.counts(layer, before_attention=True)
        for end in ends:
            weights += self._weights.counts(end - 1, before_attention=False)
        return memory_bytes(weights, self._precision.bits_of)

    def open(self, head: bool, progress: Progress | None) -> None:
        """Open the sessions of all layers, and of the head if requested. Raises: ModelFileError."""
        parts = head_part_count(self.spec) if head else 0
        done, total = 0, len(self._layers) + 1 + parts

        def step() -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done / total)

        self._whole = self.sessions_of(self._layers, step)
        if head:
            for subgraph in head_subgraphs(self._weights, self._precision):
                self._head.append(self._open(subgraph))
                del subgraph  # frees its weights before the next subgraph is made
                step()
        return_freed_memory()

    def sessions_of(self, layers: LayerRange, step: Callable[[], None] = lambda: None) -> dict[Subkey, OrtSession]:
        """Find or open the sessions that a stage over `layers` needs. Calls `step` `len(layers) + 1` times, for progress."""
        sessions = dict([self._session(project_subgraph, layers.start)])
        step()
        for layer in layers:
            last = layer == layers.end - 1
            if self.spec.experts:
                self._open_experts(layer)
                sessions.update([self._session(route_subgraph, layer)])
                if not last:
                    sessions.update([self._session(project_subgraph, layer + 1)])
            else:
                sessions.update([self._session(mix_subgraph if last else mix_project_subgraph, layer)])
            step()
        return sessions

    def _session(self, maker: SubgraphMaker, layer: int) -> tuple[Subkey, OrtSession]:
        key = maker, layer
        session = self._open_sessions.get(key)
        if session is None:
            session = self._open_sessions[key] = self._open(maker(self._weights, layer, self._precision))
        return key, session

    def mix_experts(self, layer: int, normed: F32, scores: F32) -> F32:
        """Compute the experts of a layer. `normed` is `[tokens, hidden]`, `scores` `[tokens, experts]`."""
        experts = self._experts[layer]

        def expert(index: int, rows: F32) -> F32:
            out: F32 = experts[index].run(("hidden",), {"normed": rows})[0]
            return out

        return mix_experts(normed, scores, self.spec.experts_used, expert, self._workers)

    def _open_experts(self, layer: int) -> None:
        """Open a session for each expert. An expert uses one thread: several experts run in parallel."""
        if layer not in self._experts:
            made = (expert_subgraph(self.spec, expert, self._precision) for expert in self._weights.experts(layer))
            self._experts[layer] = [self._open(subgraph, 1) for subgraph in made]

    def head(self) -> list[OrtSession]:
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
        self._whole.clear()
        self._experts.clear()
        self._head.clear()
        self._embedding = None
        return_freed_memory()

    def _open(self, subgraph: Subgraph, threads: int | None = None) -> OrtSession:
        self._freed += subgraph.bytes
        session = OrtSession(subgraph, threads or self._workers.threads, self._least_rows)
        if self._freed > TRIM_BYTES:
            self._freed = 0
            return_freed_memory()
        return session


class OrtBackend:
    """onnxruntime on the CPU."""

    def __init__(self, threads: int, *, exact: bool = False) -> None:
        """With `exact`, products use float32 activations, which is several times slower."""
        self.name = f"onnxruntime{EXACT}" if exact else "onnxruntime"
        self.precision = "f32" if exact else "int8"
        self.threads = threads
        self._precision = (
            Precision(ACCURACY_F32, zero_points=False) if exact else Precision(ACCURACY_INT8, zero_points=zero_points_work())
        )
        self._workers = Workers(threads)

    def memory_bytes(self, weights: Mapping[str, int]) -> int:
        """Return the bytes that weights take in sessions, as `Backend.memory_bytes` does."""
        return memory_bytes(weights, self._precision.bits_of)

    def arena(self, budget_bytes: int) -> HostArena:
        """Make the arena: attention is computed in host memory."""
        return HostArena(budget_bytes)

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
