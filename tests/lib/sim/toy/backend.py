"""The toy model as a backend, over the real KV arena.

The tokens depend on all values of K and V in all layers, and on the positions of these values. A page that is lost, stale,
repeated or in the wrong place changes the tokens, and so does a step out of order.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault
from meshd.kernels.backend import Progress, Segment, WeightSource
from meshd.kernels.forward import HostStage
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.lease import HostLease
from meshd.types import LayerRange, ModelSpec
from sim.toy.mathematics import F32, HIDDEN, PRIME, VOCAB, checksum, logits_of, mix, project, toy_card
from whole_pass import WholePass


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
    attention_share: float = 0.0004
    """Time for each position that a token attends to, as a share of the first token's time: at 500 positions it adds a fifth."""
    slow: float = 1.0
    """Factor by which all computation takes longer."""
    garbage: str = ""
    """`nan`: all results are NaN. Empty: results are correct."""


class ToyArena(HostArena):
    """An arena that counts the changes of its leases."""

    changes = 0

    def _reserve(self, lease: HostLease, size: int) -> None:
        super()._reserve(lease, size)
        self.changes += 1


class ToyBackend:
    """Implements `meshd.kernels.backend.Backend`."""

    name = "toy"
    precision = "int"
    threads = 1

    def __init__(self, meter: Meter, speed: Speed, numerics: int = 0) -> None:
        self._meter = meter
        self._speed = speed
        self._numerics = numerics

    def memory_bytes(self, weights: Mapping[str, int]) -> int:
        """The toy's weights take as much memory as their file."""
        return 4 * sum(weights.values())

    def arena(self, budget_bytes: int) -> ToyArena:
        return ToyArena(budget_bytes)

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
        return ToyLoaded(spec, layers, embedding, head, self._meter, self._speed, self._numerics)


@dataclass(slots=True)
class ToyLoaded:
    """Implements `meshd.kernels.backend.LoadedLayers`."""

    spec: ModelSpec
    layers: LayerRange
    embedding: bool
    head: bool
    meter: Meter
    speed: Speed
    numerics: int = 0
    closed: bool = False

    @property
    def weight_bytes(self) -> int:
        card = toy_card(self.spec.layers)
        borders = (card.embedding_bytes if self.embedding else 0) + (card.head_bytes if self.head else 0)
        return sum(card.layer_bytes[layer] for layer in self.layers) + borders

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        """A border needs a fiftieth of a layer, so that stages over parts must be prepared."""
        borders = {border for part in parts for border in (part.start, part.end)} - {self.layers.start, self.layers.end}
        return len(borders) * toy_card(self.spec.layers).layer_bytes[0] // 50

    def stage(self, layers: LayerRange) -> "ToyStage":
        if layers not in self.layers:
            raise LocalFault(f"layers {layers} are not loaded, only {self.layers}")
        return ToyStage(self, layers)

    def close(self) -> None:
        self.closed = True


class ToyStage(HostStage):
    """Implements `meshd.kernels.backend.Stage`."""

    width = HIDDEN

    def __init__(self, loaded: ToyLoaded, layers: LayerRange) -> None:
        self.loaded = loaded
        self.layers = layers

    def embed(self, ids: npt.NDArray[np.int32]) -> F32:
        if not self.loaded.embedding:
            raise LocalFault("the embedding is not loaded")
        wide = ids.astype(np.int64)[:, None]
        part = np.arange(HIDDEN, dtype=np.int64)
        return ((wide * (17 + 29 * part) + 7 * part + 1) % PRIME).astype(np.float32)

    def begin(self, hidden: F32, segments: Sequence[Segment]) -> WholePass:
        return WholePass(lambda: self._compute(hidden, segments))

    def _compute(self, hidden: F32, segments: Sequence[Segment]) -> F32:
        assert not self.loaded.closed, "a stage computes on weights that were freed"
        if len(hidden) != sum(segment.tokens for segment in segments):
            raise LocalFault("the number of hidden states is not that of the segments' tokens")
        if not np.isfinite(hidden).all():
            raise LocalFault("hidden states are not finite")
        outputs, at = [], 0
        for segment in segments:
            assert segment.lease.is_open, "a step computes on KV that was freed"
            outputs.append(self._segment(hidden[at : at + segment.tokens], segment))
            at += segment.tokens
        speed = self.loaded.speed
        attended = sum(segment.tokens * (segment.start + segment.tokens / 2) for segment in segments)
        work = 1 + (at - 1) * speed.prefill_share + attended * speed.attention_share
        self.loaded.meter.spent_s += speed.slow * (speed.call_s + work * len(self.layers) * speed.token_layer_s)
        out = outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
        if speed.garbage == "nan":
            out = np.full_like(out, np.nan)
        return out

    def _segment(self, hidden: F32, segment: Segment) -> F32:
        if segment.tokens == 1:
            return self._single_token(hidden, segment)
        h = np.rint(hidden).astype(np.int64).T % PRIME
        at = np.arange(segment.start, segment.start + segment.tokens)
        for layer in self.layers:
            k0, k1, v0, v1 = project(layer, at, h)  # type: ignore[arg-type]
            _store(layer, segment, np.stack([k0, k1], axis=1), np.stack([v0, v1], axis=1))
            s0, s1 = (np.array(_checksums(rows, segment)) % PRIME for rows in _read(layer, segment))
            h = np.stack(mix(h, s0, s1, self.loaded.numerics))  # type: ignore[arg-type]
        return np.ascontiguousarray(h.T, dtype=np.float32)

    def _single_token(self, hidden: F32, segment: Segment) -> F32:
        h = tuple(round(value) % PRIME for value in hidden[0].tolist())
        for layer in self.layers:
            k0, k1, v0, v1 = project(layer, segment.start, h)
            _store(layer, segment, np.array([[k0, k1]]), np.array([[v0, v1]]))
            k, v = _read(layer, segment)
            h = mix(h, checksum(k, 0) % PRIME, checksum(v, 0) % PRIME, self.loaded.numerics)
        return np.array([h], dtype=np.float32)

    def logits(self, hidden: F32) -> F32:
        if not self.loaded.head:
            raise LocalFault("the head is not loaded")
        self.loaded.meter.spent_s += self.loaded.speed.slow * self.loaded.speed.call_s
        if not np.isfinite(hidden).all():
            return np.full((len(hidden), VOCAB), np.nan, np.float32)
        return logits_of(np.rint(hidden).astype(np.int64) % PRIME)


def _store(layer: int, segment: Segment, k: npt.NDArray[np.int64], v: npt.NDArray[np.int64]) -> None:
    assert isinstance(segment.lease, HostLease)
    segment.lease.write(layer, segment.start, k.astype(np.float32)[:, None, :], v.astype(np.float32)[:, None, :])


def _read(layer: int, segment: Segment) -> list[F32]:
    """Read the rows of K and of V of a layer, from the first position to the segment's last."""
    assert isinstance(segment.lease, HostLease)
    end = segment.start + segment.tokens
    return [rows[:end] for rows in segment.lease.read(layer, end)]


def _checksums(rows: F32, segment: Segment) -> list[int]:
    """Compute the checksum of the rows up to each position of the segment."""
    so_far = checksum(rows[: segment.start], 0)
    sums = []
    for row in rows[segment.start :].view(np.dtype((np.void, rows[0].nbytes))).reshape(segment.tokens).tolist():
        so_far = checksum(row, so_far)
        sums.append(so_far)
    return sums
