"""The interface of a backend: model mathematics for a range of layers, split at each attention.

A step is a ragged batch of segments: tokens of several sessions concatenated in one array, each session with its own block table.
Attention is a separate function (`Attend`), so that paged KV, shared prefixes and shards on other peers need no other code path:

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
    """A model's tensors by their GGUF names, as stored in the model's file."""

    def tensor(self, name: str) -> Tensor:
        """Return the tensor. Raises: ModelFileError if it can't be read."""
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
    """How a layer computes its attention scores and which keys a token attends to."""

    scale: float | None = None
    """Factor on q.k. None: 1 / sqrt(head_dim)."""
    window: int = 0
    """A token attends to itself and the `window - 1` tokens before it. 0: to itself and all tokens before it."""
    soft_cap: float = 0.0
    """Scores become `soft_cap * tanh(score / soft_cap)`. 0: no cap."""
    sinks: F32 | None = None
    """`[heads]`: for each head, a score that is added to the softmax without a value vector."""


PLAIN = AttentionRule()


@dataclass(frozen=True, slots=True)
class Projected:
    """The inputs of a layer's attention, and the residual for the mixing after it."""

    q: F32  # [tokens, heads, head_dim], rotated
    k: F32  # [tokens, kv_heads, head_dim], rotated
    v: F32  # [tokens, kv_heads, head_dim]
    residual: F32  # [tokens, hidden]
    rule: AttentionRule = PLAIN


Attend = Callable[[int, Projected, Sequence[Segment], KVPool], F32]
"""(layer, projected, segments, kv) -> [tokens, heads, head_dim].

Stores the new K and V, then computes the attention of each token to itself and the tokens before it, as the rule says.
"""


class Stage(Protocol):
    """Layers `[a, b)`, ready to compute. Results don't depend, bit for bit, on the split into stages."""

    @property
    def layers(self) -> LayerRange: ...

    def embed(self, ids: Ids) -> F32:
        """Look up embeddings: `[tokens]` to `[tokens, hidden]`.

        Raises: InvalidRequest for an id outside the vocabulary, LocalFault if the table is not loaded.
        """
        ...

    def project(self, hidden: F32, positions: Positions) -> Projected:
        """Compute the first layer up to its attention: norm, QKV, rope. `hidden` is `[tokens, hidden]`, `positions` `[tokens]`."""
        ...

    def mix_project(self, layer: int, mixed: F32, residual: F32, positions: Positions) -> Projected:
        """Compute `layer` after its attention, then `layer + 1` up to its attention.

        `mixed` is the attention's result `[tokens, heads, head_dim]`.
        """
        ...

    def mix(self, mixed: F32, residual: F32) -> F32:
        """Compute the last layer after its attention. Returns: `[tokens, hidden]`."""
        ...

    def forward(self, hidden: F32, segments: Sequence[Segment], kv: KVPool, attend: Attend | None = None) -> F32:
        """Compute a step through all layers. `hidden` is `[tokens, hidden]`; `kv` holds the KV of these layers.

        If `attend` is None, the stage itself computes attention, over `kv`.

        Raises: LocalFault if `hidden` does not match the segments, a position is outside its block table, or KV is not finite.
        """
        ...

    def logits(self, hidden: F32) -> F32:
        """Compute final norm and head: `[rows, hidden]` to `[rows, vocab]`. Raises: LocalFault if the head is not loaded."""
        ...


class LoadedLayers(Protocol):
    """Weights in memory, in the backend's own form. Their `WeightSource` must stay open until `close`."""

    @property
    def layers(self) -> LayerRange: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory now. The first stage over only a part of the layers may add some."""
        ...

    def stage(self, layers: LayerRange) -> Stage:
        """Make a stage over some of the loaded layers, which shares their weights. Raises: LocalFault if a layer is not loaded."""
        ...

    def close(self) -> None:
        """Free the weights. Idempotent. Stages of these layers must not be used afterwards."""
        ...


class Backend(Protocol):
    """Loads layers with one library on one device."""

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
        """Read the weights of `layers`, and the embedding table or the head if requested. `progress` gets the done part, 0 to 1.

        Raises: ModelFileError, OutOfMemory.
        """
        ...


EXACT = "-exact"
"""Suffix of a backend's name: products use float32 activations. `torch` always does, so it has no suffix."""
