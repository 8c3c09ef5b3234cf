"""A toy model: exact arithmetic modulo a prime, in float32, over the real KV pool.

What comes out depends on every K and V of every layer and position, and on the position each stands at: a block that is lost,
stale, repeated or in the wrong place, or a step out of order, changes the tokens. `reference` computes the same without pool,
stages or batches: one token after another, one running sum per layer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from meshd.agents.placement.model_library import ModelText
from meshd.errors import LocalFault
from meshd.kernels.backend import Progress, Segment, WeightSource
from meshd.kernels.kv import BlockTable, KVPool
from meshd.kernels.sampler import Sampler
from meshd.types import LayerRange, ModelCard, ModelId, ModelSpec, SamplingParams, TokenLogprobs

F32 = npt.NDArray[np.float32]
PRIME = 4093
"""Its square fits in float32's 24 bits."""
VOCAB = 64
HIDDEN = 4
CONTEXT = 512
END = 0
"""The end-of-sequence token."""
MIB = 1 << 20


def toy_card(layers: int = 6, layer_bytes: int = 50 * MIB, name: str = "toy") -> ModelCard:
    """Pretends to weigh what a real one does."""
    spec = ModelSpec(
        architecture="llama",
        layers=layers,
        hidden=HIDDEN,
        heads=1,
        kv_heads=1,
        head_dim=2,
        ffn=8,
        vocab=VOCAB,
        context_length=CONTEXT,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=False,
    )
    return ModelCard(
        id=ModelId(f"{layers:032x}"),
        name=name,
        ref=f"file:/{name}.gguf",
        quantisation="F32",
        spec=spec,
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=4 * MIB,
        head_bytes=4 * MIB,
        layer_parameters=(layer_bytes // 4,) * layers,
        head_parameters=MIB,
        end_of_sequence=(END,),
    )


@lru_cache(maxsize=64)
def _weights(layer: int) -> npt.NDArray[np.float64]:
    """How much each position counts in a layer's sums: never 0."""
    at = np.arange(CONTEXT, dtype=np.int64)
    return (1 + (at * at * 7 + at * 131 + layer * 17) % (PRIME - 1)).astype(np.float64)


@lru_cache(maxsize=64)
def _weights_of(layer: int) -> tuple[int, ...]:
    return tuple(int(weight) for weight in _weights(layer))


def _embed(token: int) -> tuple[int, int, int, int]:
    return tuple((token * (17 + 29 * part) + 7 * part + 1) % PRIME for part in range(HIDDEN))  # type: ignore[return-value]


def _project(layer: int, position: int, h: Sequence[int]) -> tuple[int, int, int, int]:
    """(k0, k1, v0, v1)."""
    return (
        (31 * h[0] + h[1] + position) % PRIME,
        (57 * h[2] + h[3] + layer) % PRIME,
        (h[0] + 91 * h[2] + 1) % PRIME,
        (h[1] + 73 * h[3] + 2) % PRIME,
    )


def _mix(h: Sequence[int], s0: int, s1: int) -> tuple[int, int, int, int]:
    return ((h[0] + s0) % PRIME, (h[1] + h[0] * s1) % PRIME, (h[2] + s1 + 3 * s0) % PRIME, (h[3] + s0 * s1 + 1) % PRIME)


_LOGIT_WEIGHTS = np.array(
    [[2 * j + 1, (j * j + 3 * j + 1) % PRIME, 5 * j + 7, (j * j * j + 11) % PRIME] for j in range(VOCAB)], dtype=np.int64
)


def _logits(h: npt.NDArray[np.int64]) -> F32:
    """`[rows, 4]` to `[rows, vocab]`: 0 to 10 in steps of 0.04."""
    hashed: npt.NDArray[np.int64] = h @ _LOGIT_WEIGHTS.T % PRIME % 251
    logits: F32 = np.asarray(hashed / 25, np.float32)
    return logits


# The reference


@dataclass(slots=True)
class PlainModel:
    """The model without any cluster: feed tokens, ask for logits."""

    layers: int
    position: int = 0
    h: tuple[int, int, int, int] = (0, 0, 0, 0)
    sums: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = [[0, 0] for _ in range(self.layers)]

    def feed(self, token: int) -> None:
        h = _embed(token)
        for layer in range(self.layers):
            k0, k1, v0, v1 = _project(layer, self.position, h)
            weight, sums = _weights_of(layer)[self.position], self.sums[layer]
            sums[0] = (sums[0] + weight * (k0 + 3 * v1)) % PRIME
            sums[1] = (sums[1] + weight * (k1 + 5 * v0)) % PRIME
            h = _mix(h, sums[0], sums[1])
        self.h = h
        self.position += 1

    def logits(self) -> F32:
        return _logits(np.array([self.h], dtype=np.int64))[0]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request must give, token for token."""

    tokens: tuple[int, ...]
    """With the end-of-sequence token, if it comes to that."""
    logprobs: tuple[TokenLogprobs | None, ...]
    finish: str


def reference(
    layers: int, prompt: Sequence[int], sampling: SamplingParams, max_tokens: int, *, ignore_eos: bool = False
) -> Expected:
    """Computed one token after another."""
    model, sampler = PlainModel(layers), Sampler(sampling, prompt)
    for token in prompt:
        model.feed(token)
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    while True:
        token, told = sampler.pick(model.logits(), model.position)
        sampler.accept(token)
        tokens.append(token)
        logprobs.append(told)
        if token == END and not ignore_eos:
            return Expected(tuple(tokens), tuple(logprobs), "stop")
        if len(tokens) == max_tokens:
            return Expected(tuple(tokens), tuple(logprobs), "length")
        model.feed(token)


# The backend


@dataclass(slots=True)
class Meter:
    """Virtual time that work has taken; `perf_counter` returns it while a simulation runs."""

    spent_s: float = 0.0


@dataclass(slots=True)
class Speed:
    """Of one peer; the simulator changes it as it goes."""

    token_layer_s: float = 0.001
    call_s: float = 0.0002
    prefill_share: float = 0.1
    """What one more token of a step costs, as part of the first one's cost."""
    slow: float = 1.0
    garbage: str = ""
    """`nan`: what it computes is not finite."""


class ToyBackend:
    """Implements `kernels.backend.Backend`."""

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
    """Implements `kernels.backend.LoadedLayers`."""

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
            raise LocalFault(f"layers {layers} are not loaded: {self.layers} are")
        return ToyStage(self, layers)

    def close(self) -> None:
        self.closed = True


@dataclass(slots=True)
class ToyStage:
    """Implements what stages use of `kernels.backend.Stage`."""

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
            raise LocalFault("hidden states are not as many as the segments say")
        if not np.isfinite(hidden).all():
            raise LocalFault("hidden states are not finite")
        outputs, at = [], 0
        for segment in segments:
            assert kv._live.get(segment.table.id) is segment.table, "a step computes on KV that was freed"
            outputs.append(self._segment(hidden[at : at + segment.tokens], segment, kv))
            at += segment.tokens
        speed = self.loaded.speed
        work = 1 + (at - 1) * speed.prefill_share  # tokens together cost less than one after another
        self.loaded.meter.spent_s += speed.slow * (speed.call_s + work * len(self.layers) * speed.token_layer_s)
        out = outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
        if speed.garbage == "nan":
            out = np.full_like(out, np.nan)
        return out

    def _segment(self, hidden: F32, segment: Segment, kv: KVPool) -> F32:
        if segment.tokens == 1:
            return self._one(hidden, segment, kv)
        h = np.rint(hidden).astype(np.int64).T % PRIME
        at = np.arange(segment.start, segment.start + segment.tokens)
        for layer in self.layers:
            k0, k1, v0, v1 = _project(layer, at, h)  # type: ignore[arg-type]
            base0, base1 = _sums(kv, layer, segment.table, segment.start)
            _store(kv, layer, segment, np.stack([k0, k1], axis=1), np.stack([v0, v1], axis=1))
            weights = _weights(layer)[at].astype(np.int64)
            s0 = (base0 + np.cumsum(weights * (k0 + 3 * v1))) % PRIME
            s1 = (base1 + np.cumsum(weights * (k1 + 5 * v0))) % PRIME
            h = np.stack(_mix(h, s0, s1))  # type: ignore[arg-type]
        return np.ascontiguousarray(h.T, dtype=np.float32)

    def _one(self, hidden: F32, segment: Segment, kv: KVPool) -> F32:
        h = tuple(round(value) % PRIME for value in hidden[0].tolist())
        start = segment.start
        for layer in self.layers:
            k0, k1, v0, v1 = _project(layer, start, h)
            base0, base1 = _sums(kv, layer, segment.table, start)
            _store(kv, layer, segment, np.array([[k0, k1]]), np.array([[v0, v1]]))
            weight = _weights_of(layer)[start]
            h = _mix(h, (base0 + weight * (k0 + 3 * v1)) % PRIME, (base1 + weight * (k1 + 5 * v0)) % PRIME)
        return np.array([h], dtype=np.float32)

    def logits(self, hidden: F32) -> F32:
        if not self.loaded.head:
            raise LocalFault("the head is not loaded")
        self.loaded.meter.spent_s += self.loaded.speed.slow * self.loaded.speed.call_s
        if not np.isfinite(hidden).all():
            return np.full((len(hidden), VOCAB), np.nan, np.float32)
        return _logits(np.rint(hidden).astype(np.int64) % PRIME)


def _store(kv: KVPool, layer: int, segment: Segment, k: npt.NDArray[np.int64], v: npt.NDArray[np.int64]) -> None:
    kv.write(layer, segment.table, segment.start, k.astype(np.float32)[:, None, :], v.astype(np.float32)[:, None, :])


def _sums(kv: KVPool, layer: int, table: BlockTable, tokens: int) -> tuple[int, int]:
    """Over what the pool holds of the positions before."""
    if tokens == 0:
        return 0, 0
    k, v = kv.read(layer, table, tokens)
    weights = _weights(layer)[:tokens]
    k0, k1 = weights @ k[:tokens, 0]
    v0, v1 = weights @ v[:tokens, 0]
    return int(k0 + 3 * v1) % PRIME, int(k1 + 5 * v0) % PRIME


# The text side


class ToyStream:
    """Implements `text.StreamDecoder`."""

    def push(self, token: int) -> str:
        return letter(token)

    def flush(self) -> str:
        return ""


class ToyTokenizer:
    """What answers use of a tokenizer: one letter for each token."""

    def stream(self, *, after: int | None = None) -> ToyStream:
        return ToyStream()

    def token_bytes(self, token: int) -> bytes:
        return letter(token).encode()


def letter(token: int) -> str:
    return chr(0x4E00 + token)


def toy_text(card: ModelCard) -> ModelText:
    return ModelText(card, ToyTokenizer(), None)  # type: ignore[arg-type]


def random_prompt(rng: random.Random, longest: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, longest)))
