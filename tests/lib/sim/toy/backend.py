"""The toy model as a backend, over the real KV pool.

The tokens depend on all values of K and V in all layers, and on the positions of these values. A block that is lost, stale,
repeated or in the wrong place changes the tokens, and so does a step out of order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault
from meshd.kernels.backend import Progress, Segment, WeightSource
from meshd.kernels.kv import BlockTable, KVPool
from meshd.types import LayerRange, ModelSpec
from sim.toy.mathematics import F32, HIDDEN, PRIME, VOCAB, logits_of, mix, position_weights, position_weights_int, project, toy_card


@dataclass(slots=True)
class Meter:
    """Virtual seconds that computation has taken. During a run, meshd's clocks (`time.perf_counter`, ...) include them."""

    spent_s: float = 0.0


@dataclass(slots=True)
class Speed:
    """How fast one peer computes, and whether it computes garbage. Faults change it during the run."""

    token_layer_s: float = 0.001
    call_s: float = 0.0002
    prefill_share: float = 0.4
    """Time for each further token of a step, as a share of the first token's time. With 0.4, a prefill chunk of 128 tokens takes 50
    times as long as a decode step, as with 4-bit weights on a processor that is short of arithmetic."""
    slow: float = 1.0
    """Factor by which all computation takes longer."""
    garbage: str = ""
    """`nan`: all results are NaN. Empty: results are correct."""


class ToyBackend:
    """Implements `meshd.kernels.backend.Backend`."""

    name = "toy"
    threads = 1

    def __init__(self, meter: Meter, speed: Speed) -> None:
        self._meter = meter
        self._speed = speed

    def load(
        self,
        spec: ModelSpec,
        layers: LayerRange,
        weights: WeightSource,
        *,
        embedding: bool,
        head: bool,
        progress: Progress | None = None,
    ) -> "ToyLoaded":
        if progress is not None:
            progress(1.0)
        return ToyLoaded(spec, layers, embedding, head, self._meter, self._speed)


@dataclass(slots=True)
class ToyLoaded:
    """Implements `meshd.kernels.backend.LoadedLayers`."""

    spec: ModelSpec
    layers: LayerRange
    embedding: bool
    head: bool
    meter: Meter
    speed: Speed
    closed: bool = False

    @property
    def weight_bytes(self) -> int:
        card = toy_card(self.spec.layers)
        borders = (card.embedding_bytes if self.embedding else 0) + (card.head_bytes if self.head else 0)
        return sum(card.layer_bytes[layer] for layer in self.layers) + borders

    def stage(self, layers: LayerRange) -> "ToyStage":
        if layers not in self.layers:
            raise LocalFault(f"layers {layers} are not loaded, only {self.layers}")
        return ToyStage(self, layers)

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class ToyStage:
    """Implements the part of `meshd.kernels.backend.Stage` that sessions use."""

    loaded: ToyLoaded
    layers: LayerRange

    def embed(self, ids: npt.NDArray[np.int32]) -> F32:
        if not self.loaded.embedding:
            raise LocalFault("the embedding is not loaded")
        wide = ids.astype(np.int64)[:, None]
        part = np.arange(HIDDEN, dtype=np.int64)
        return ((wide * (17 + 29 * part) + 7 * part + 1) % PRIME).astype(np.float32)

    def forward(self, hidden: F32, segments: Sequence[Segment], kv: KVPool, attend: object = None) -> F32:
        assert attend is None
        assert not self.loaded.closed, "a stage computes on weights that were freed"
        if len(hidden) != sum(segment.tokens for segment in segments):
            raise LocalFault("the number of hidden states is not that of the segments' tokens")
        if not np.isfinite(hidden).all():
            raise LocalFault("hidden states are not finite")
        outputs, at = [], 0
        for segment in segments:
            assert kv._live.get(segment.table.id) is segment.table, "a step computes on KV that was freed"
            outputs.append(self._segment(hidden[at : at + segment.tokens], segment, kv))
            at += segment.tokens
        speed = self.loaded.speed
        work = 1 + (at - 1) * speed.prefill_share
        self.loaded.meter.spent_s += speed.slow * (speed.call_s + work * len(self.layers) * speed.token_layer_s)
        out = outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
        if speed.garbage == "nan":
            out = np.full_like(out, np.nan)
        return out

    def _segment(self, hidden: F32, segment: Segment, kv: KVPool) -> F32:
        if segment.tokens == 1:
            return self._single_token(hidden, segment, kv)
        h = np.rint(hidden).astype(np.int64).T % PRIME
        at = np.arange(segment.start, segment.start + segment.tokens)
        for layer in self.layers:
            k0, k1, v0, v1 = project(layer, at, h)  # type: ignore[arg-type]
            base0, base1 = _sums(kv, layer, segment.table, segment.start)
            _store(kv, layer, segment, np.stack([k0, k1], axis=1), np.stack([v0, v1], axis=1))
            weights = position_weights(layer)[at].astype(np.int64)
            s0 = (base0 + np.cumsum(weights * (k0 + 3 * v1))) % PRIME
            s1 = (base1 + np.cumsum(weights * (k1 + 5 * v0))) % PRIME
            h = np.stack(mix(h, s0, s1))  # type: ignore[arg-type]
        return np.ascontiguousarray(h.T, dtype=np.float32)

    def _single_token(self, hidden: F32, segment: Segment, kv: KVPool) -> F32:
        h = tuple(round(value) % PRIME for value in hidden[0].tolist())
        start = segment.start
        for layer in self.layers:
            k0, k1, v0, v1 = project(layer, start, h)
            base0, base1 = _sums(kv, layer, segment.table, start)
            _store(kv, layer, segment, np.array([[k0, k1]]), np.array([[v0, v1]]))
            weight = position_weights_int(layer)[start]
            h = mix(h, (base0 + weight * (k0 + 3 * v1)) % PRIME, (base1 + weight * (k1 + 5 * v0)) % PRIME)
        return np.array([h], dtype=np.float32)

    def logits(self, hidden: F32) -> F32:
        if not self.loaded.head:
            raise LocalFault("the head is not loaded")
        self.loaded.meter.spent_s += self.loaded.speed.slow * self.loaded.speed.call_s
        if not np.isfinite(hidden).all():
            return np.full((len(hidden), VOCAB), np.nan, np.float32)
        return logits_of(np.rint(hidden).astype(np.int64) % PRIME)


def _store(kv: KVPool, layer: int, segment: Segment, k: npt.NDArray[np.int64], v: npt.NDArray[np.int64]) -> None:
    kv.write(layer, segment.table, segment.start, k.astype(np.float32)[:, None, :], v.astype(np.float32)[:, None, :])


def _sums(kv: KVPool, layer: int, table: BlockTable, tokens: int) -> tuple[int, int]:
    """Compute a layer's two sums over the first `tokens` positions from the K and V in the pool."""
    if tokens == 0:
        return 0, 0
    k, v = kv.read(layer, table, tokens)
    weights = position_weights(layer)[:tokens]
    k0, k1 = weights @ k[:tokens, 0]
    v0, v1 = weights @ v[:tokens, 0]
    return int(k0 + 3 * v1) % PRIME, int(k1 + 5 * v0) % PRIME
