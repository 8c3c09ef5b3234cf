"""The hybrid model: its layers, each over the rows and states of a lease, and the same network without any memory.

Every token is computed alone, in one order of float32 operations, so that results can be compared bit for bit. The recurrent layer
has a convolution over four rows and a state that decays; it folds the rows since the last page border into the state there.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault
from meshd.kernels.backend import Segment
from meshd.kernels.forward import HostStage
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import PAGE_TOKENS, LayerMemory, full, latent, recurrent, shared, windowed
from meshd.types import LayerRange, ModelSpec
from whole_pass import WholePass

F32 = npt.NDArray[np.float32]
WIDTH, VOCAB, WINDOW, HISTORY, DECAY = 8, 64, 12, 3, np.float32(0.9)
MEMORIES: tuple[LayerMemory, ...] = (
    latent(WIDTH),
    recurrent((WIDTH, WIDTH), 2 * WIDTH, HISTORY),
    full(1, WIDTH, WIDTH),
    shared(2),
    windowed(WINDOW, 1, WIDTH, WIDTH),
    recurrent((WIDTH, WIDTH), 2 * WIDTH, HISTORY),
)
LAYERS = len(MEMORIES)
"""A split between a layer and the one that reads its memory is not possible."""
SPEC = ModelSpec(
    architecture="hybrid",
    layers=LAYERS,
    hidden=WIDTH,
    heads=1,
    kv_heads=1,
    head_dim=WIDTH,
    ffn=WIDTH,
    vocab=VOCAB,
    context_length=4096,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_head=True,
)


def memory_of(spec: ModelSpec, layer: int, kv_heads: int) -> LayerMemory:
    """Stands in for the function that derives a layer's memory from a spec: no spec describes such layers yet."""
    return MEMORIES[layer]


def _matrix(layer: int, name: str, shape: tuple[int, int]) -> F32:
    seed = np.random.Philox([layer, sum(name.encode())])
    return np.random.Generator(seed).standard_normal(shape, dtype=np.float32) / np.float32(2)


def _times(vector: F32, matrix: F32) -> F32:
    """Multiply without a library whose order of sums depends on shapes."""
    out: F32 = (vector[:, None] * matrix).sum(axis=0, dtype=np.float32)
    return out


class Layer:
    """One layer. `rows` computes what is stored of a token, `mix` its output from what is stored."""

    def __init__(self, index: int) -> None:
        self.memory = MEMORIES[index]
        self.index = index
        self._k, self._v, self._q = (_matrix(index, name, (WIDTH, WIDTH)) for name in "kvq")
        self._conv = _matrix(index, "conv", (HISTORY + 1, 2 * WIDTH))

    def rows(self, x: F32) -> list[F32]:
        """Compute the rows of a token from its hidden state `[width]`. Returns: one array `[1, *shape]` for each kind of row."""
        parts = [_times(x, self._k), _times(x, self._v)]
        if len(self.memory.rows) == 2:
            return [part.reshape(1, 1, WIDTH) for part in parts]
        return [np.concatenate(parts)[None, : self.memory.rows[0][0]]] if self.memory.rows else []

    def attend(self, x: F32, keys: F32, values: F32) -> F32:
        """Attend to rows `[tokens, width]`."""
        scores = (keys * _times(x, self._q)).sum(axis=1, dtype=np.float32)
        weights = np.exp(scores - scores.max())
        mixed: F32 = (values * weights[:, None]).sum(axis=0, dtype=np.float32) / weights.sum(dtype=np.float32)
        return mixed

    def fold(self, state: F32, rows: F32) -> F32:
        """Add one token to a state. `rows`: its row and those of the tokens before it, `[history + 1, 2 * width]`."""
        key, value = np.split((rows * self._conv).sum(axis=0, dtype=np.float32), 2)
        folded: F32 = DECAY * state + np.tanh(key)[:, None] * value
        return folded

    def read_state(self, x: F32, state: F32) -> F32:
        return np.tanh(_times(_times(x, self._q), state))


def history_of(rows: F32, position: int) -> F32:
    """The rows of a position and of the positions before it, zero before the first, `[history + 1, width]`."""
    first = position - HISTORY
    return np.concatenate([np.zeros((max(0, -first), rows.shape[1]), np.float32), rows[max(0, first) : position + 1]])


class HybridStage(HostStage):
    """Implements `meshd.kernels.backend.Stage`."""

    width = WIDTH

    def __init__(self, layers: LayerRange) -> None:
        self.layers = layers
        self._layers = [Layer(layer) for layer in layers]
        self._embedding = _matrix(0, "embedding", (VOCAB, WIDTH))
        self._head = _matrix(0, "head", (WIDTH, VOCAB))

    def embed(self, ids: npt.NDArray[np.int32]) -> F32:
        return self._embedding[ids]

    def logits(self, hidden: F32) -> F32:
        return np.stack([_times(row, self._head) for row in hidden])

    def begin(self, hidden: F32, segments: Sequence[Segment]) -> WholePass:
        return WholePass(lambda: self._compute(hidden, segments))

    def _compute(self, hidden: F32, segments: Sequence[Segment]) -> F32:
        outputs, at = [], 0
        for segment in segments:
            assert isinstance(segment.lease, HostLease)
            for position in range(segment.start, segment.start + segment.tokens):
                x = hidden[at].copy()
                for layer in self._layers:
                    x = x + np.tanh(self._mix(layer, segment.lease, position, x))
                outputs.append(x)
                at += 1
        return np.stack(outputs)

    def _mix(self, layer: Layer, lease: HostLease, position: int, x: F32) -> F32:
        rows = layer.rows(x)
        if rows:
            lease.write(layer.index, position, *rows)
        stored = [part.reshape(len(part), -1) for part in lease.read(layer.index, position + 1)]
        if layer.memory.state:
            return self._recur(layer, lease, position, x, stored[0])
        first = max(0, position + 1 - layer.memory.window) if layer.memory.window else 0
        return layer.attend(x, stored[0][first : position + 1], stored[-1][first : position + 1])

    def _recur(self, layer: Layer, lease: HostLease, position: int, x: F32, rows: F32) -> F32:
        border, state = lease.state_before(layer.index, position)
        for each in range(border, position + 1):
            state = layer.fold(state, history_of(rows, each))
            if (each + 1) % PAGE_TOKENS == 0:
                lease.set_state(layer.index, each + 1, state)
        return layer.read_state(x, state)


@dataclass
class HybridLoaded:
    """Implements `meshd.kernels.backend.LoadedLayers`."""

    layers: LayerRange = field(default_factory=lambda: LayerRange(0, LAYERS))
    weight_bytes: int = 0

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        return 0

    def stage(self, layers: LayerRange) -> HybridStage:
        if layers not in self.layers:
            raise LocalFault(f"layers {layers} are not loaded")
        return HybridStage(layers)

    def close(self) -> None:
        pass


@dataclass
class PlainHybrid:
    """The network without a lease: rows in lists, states from the first token on."""

    rows: list[list[F32]] = field(default_factory=lambda: [[] for _ in MEMORIES])
    values: list[list[F32]] = field(default_factory=lambda: [[] for _ in MEMORIES])
    states: list[F32] = field(default_factory=lambda: [np.zeros((WIDTH, WIDTH), np.float32) for _ in MEMORIES])
    stage: HybridStage = field(default_factory=lambda: HybridStage(LayerRange(0, LAYERS)))

    def feed(self, token: int) -> F32:
        """Compute one token. Returns: its hidden state after the last layer."""
        x = self.stage.embed(np.array([token], np.int32))[0]
        for layer in self.stage._layers:
            x = x + np.tanh(self._mix(layer, x))
        return x

    def _mix(self, layer: Layer, x: F32) -> F32:
        own = layer.index if layer.memory.rows else layer.memory.layer
        parts = [part.reshape(-1) for part in layer.rows(x)]
        if parts:
            self.rows[own].append(parts[0])
            self.values[own].append(parts[-1])
        rows, values = np.stack(self.rows[own]), np.stack(self.values[own])
        if layer.memory.state:
            self.states[own] = layer.fold(self.states[own], history_of(rows, len(rows) - 1))
            return layer.read_state(x, self.states[own])
        return layer.attend(x, rows[-layer.memory.window :], values[-layer.memory.window :])

    def answer(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Decode greedily."""
        for token in prompt:
            hidden = self.feed(token)
        found: list[int] = []
        while len(found) < tokens:
            found.append(int(self.stage.logits(hidden[None])[0].argmax()))
            hidden = self.feed(found[-1])
        return found
