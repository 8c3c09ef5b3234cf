"""The interface of a backend: model mathematics for a run of layers, cut at attention.

A step is a ragged batch of segments: tokens of several sessions laid end to end in one array, each session with its own block
table. Between a layer's projections and its mixing stands `Attend`, so that paged KV, shared prefixes and shards on other peers
are all the same path:

    hidden -> project -> (attend -> mix_project)* -> attend -> mix -> hidden

Arrays at the interface are C-contiguous numpy float32. Inputs may be read-only views of a received frame; they are never written.
A stage is used by one thread at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from meshd.kernels.kv import BlockTable, KVPool
from meshd.types import LayerRange, ModelSpec, Tensor

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]
Progress = Callable[[float], None]


class WeightSource(Protocol):
    """A model's tensors under GGUF's names, as they lie in its file."""

    def tensor(self, name: str) -> Tensor:
        """Raises: ModelFileError."""
        ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's part of a step: `tokens` new tokens, the first at position `start`, with KV in `table`."""

    table: BlockTable
    start: int
    tokens: int


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How a layer's scores are made, and which of them count."""

    scale: float | None = None
    """What q.k is multiplied by; None: 1 / sqrt(head_dim)."""
    window: int = 0
    """A token sees itself and `window - 1` before it; 0: all."""
    soft_cap: float = 0.0
    """Scores become `cap tanh(score / cap)`; 0: they stay."""
    sinks: F32 | None = None
    """`[heads]`: a score for each head that takes part in the softmax and gives nothing."""


PLAIN = AttentionRule()


@dataclass(frozen=True, slots=True)
class Projected:
    """What a layer hands to attention, and what it keeps for after."""

    q: F32  # [tokens, heads, head_dim], rotated
    k: F32  # [tokens, kv_heads, head_dim], rotated
    v: F32  # [tokens, kv_heads, head_dim]
    residual: F32  # [tokens, hidden]
    rule: AttentionRule = PLAIN


Attend = Callable[[int, Projected, Sequence[Segment], KVPool], F32]
"""(layer, projected, segments, kv) -> [tokens, heads, head_dim]. Stores the new K and V, then attends to all up to each token."""


class Stage(Protocol):
    """Layers `[a, b)` that can compute. Bits do not depend on where the cuts between stages are."""

    @property
    def layers(self) -> LayerRange: ...

    def embed(self, ids: Ids) -> F32:
        """`[tokens]` to `[tokens, hidden]`. Raises: InvalidRequest for an id outside the vocabulary, LocalFault if not loaded."""
        ...

    def project(self, hidden: F32, positions: Positions) -> Projected:
        """The first layer up to its attention: norm, QKV, rope. `hidden` is `[tokens, hidden]`, `positions` `[tokens]`."""
        ...

    def mix_project(self, layer: int, mixed: F32, residual: F32, positions: Positions) -> Projected:
        """`layer` from its attention's result `mixed` `[tokens, heads, head_dim]` on, and layer + 1 up to its attention."""
        ...

    def mix(self, mixed: F32, residual: F32) -> F32:
        """The last layer from its attention's result on: `[tokens, hidden]`."""
        ...

    def forward(self, hidden: F32, segments: Sequence[Segment], kv: KVPool, attend: Attend | None = None) -> F32:
        """All layers over a step. `hidden` is `[tokens, hidden]`; None attends over the KV of `kv`, which holds these layers.

        Raises: LocalFault if `hidden` is not as large as the segments say, a position is outside its table, or KV is not finite.
        """
        ...

    def logits(self, hidden: F32) -> F32:
        """Final norm and head: `[rows, hidden]` to `[rows, vocab]`. Raises: LocalFault if the head is not loaded."""
        ...


class LoadedLayers(Protocol):
    """Weights in memory, in the backend's own form. The source must stay open until `close`."""

    @property
    def layers(self) -> LayerRange: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held now; borders of inner stages add to it when they are first asked for."""
        ...

    def stage(self, layers: LayerRange) -> Stage:
        """A stage over any part of what is loaded, sharing its weights. Raises: LocalFault if it is not all here."""
        ...

    def close(self) -> None:
        """Free the weights. Idempotent; stages made of it must not be used after."""
        ...


class Backend(Protocol):
    """Makes stages."""

    @property
    def name(self) -> str: ...

    @property
    def threads(self) -> int: ...

    def load(
        self,
        spec: ModelSpec,
        layers: LayerRange,
        weights: WeightSource,
        *,
        embedding: bool,
        head: bool,
        progress: Progress | None = None,
    ) -> LoadedLayers:
        """Read the weights of `layers`; `embedding` and `head` for the first and the last stage; `progress` gets 0..1.

        Raises: ModelFileError, OutOfMemory.
        """
        ...


EXACT = "-exact"
"""After a backend's name: with activations in full precision. `torch` always has them."""
