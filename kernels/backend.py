"""The interface of a backend: model mathematics for a range of layers, as passes that pause where attention is held elsewhere.

A pass computes a ragged batch of segments: tokens of several sessions in one array, each session with its own lease of KV. Hidden
states are opaque between `embed` or `decode` and `encode` or `pick`: they are where the backend computes, which may be a GPU. What
comes from the network or goes there is bytes or numpy arrays in host memory; bytes that were received are never written.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from meshd.errors import MeshdError
from meshd.kernels.attention.tree import SPAN_TOKENS, Part
from meshd.kernels.kv.arena import KvArena
from meshd.kernels.kv.lease import ArenaLease
from meshd.kernels.sampling.sampler import Picked, PickRequest
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


class Hidden(Protocol):
    """Hidden states `[tokens, hidden]`, wherever the backend keeps them. Only stages of the backend that made them look inside."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """KV of a session that is held elsewhere: an aligned run of spans, in some layers and of some KV heads."""

    layers: LayerRange
    spans: range
    """`2 ** n` spans, the first a multiple of `2 ** n`, even if only some of them exist yet (`attention/tree.py`)."""
    kv_heads: tuple[int, int] | None = None
    """`[first, last)`. None: all KV heads."""

    @property
    def positions(self) -> range:
        return range(self.spans.start * SPAN_TOKENS, self.spans.stop * SPAN_TOKENS)


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's part of a batch: `tokens` new tokens, the first at position `start`, with KV in `lease`."""

    lease: ArenaLease
    start: int
    tokens: int
    remote: tuple[RemoteRun, ...] = ()
    """What of its KV is elsewhere: disjoint runs. Empty: nothing."""

    @property
    def end(self) -> int:
        return self.start + self.tokens


def row_slices(tokens: Iterable[int]) -> list[slice]:
    """Return the rows of each part of a batch, from the parts' numbers of tokens."""
    ends = list(accumulate(tokens, initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]


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
    residual: Any  # [tokens, hidden], in the backend's own form
    rule: AttentionRule = PLAIN


@dataclass(frozen=True, slots=True)
class AttendRequest:
    """Asks the holder of a run for its node of the attention of one segment's tokens. Arrays are C-contiguous, in host memory."""

    segment: int
    """Number of the segment in its pass."""
    run: RemoteRun
    layer: int
    start: int
    """Position of the first query."""
    q: F32
    """`[tokens, heads of the run, head_dim]`, rotated."""
    k: F32
    """`[rows, kv_heads of the run, head_dim]`, rotated: the new rows that belong to the run, which has to store them."""
    v: F32
    rule: AttentionRule
    """Without sinks: the stage applies them once, at the root."""

    @property
    def rows_start(self) -> int:
        """Position of the first row of `k` and `v`."""
        return max(self.start, self.run.positions.start)


@dataclass(frozen=True, slots=True)
class AttendCut:
    """A pass waits: it needs the parts that `requests` ask for. They are of one layer and of at least one segment."""

    requests: tuple[AttendRequest, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A pass has computed all layers."""

    hidden: Hidden
    """`[tokens, hidden]`. Rows of segments that were dropped mean nothing."""


class Pass(Protocol):
    """One computation of a batch through a stage.

        READY --run--> PAUSED (at an AttendCut) --give--> READY        READY --run--> ENDED (Done, or an error)

    While it is paused no thread needs it, so the stage may run other passes, of other segments. It holds nothing that has to be
    given back: a pass that is not wanted any more is just forgotten. It is used by one thread at a time.
    """

    def run(self) -> AttendCut | Done:
        """Compute up to the next attention that is held elsewhere, or to the end.

        Raises: LocalFault if the hidden states don't match the segments, a position is outside its lease, or KV is not finite.
        """
        ...

    def give(self, parts: Sequence[Part | None]) -> None:
        """Take what the requests of the cut asked for, in their order; None for segments that were dropped. Computes nothing.

        Raises: LocalFault if a part is missing, or has another shape than its request.
        """
        ...

    def drop(self, segment: int) -> None:
        """Compute a segment no further, while the pass is paused: its KV is not written, and no cut asks for it any more.

        The results of the other segments don't change.
        """
        ...


class Stage(Protocol):
    """Layers `[a, b)`, ready to compute. Results don't depend, bit for bit, on the split into stages.

    A stage is used by one thread at a time.
    """

    @property
    def layers(self) -> LayerRange: ...

    def embed(self, ids: Ids) -> Hidden:
        """Look up the embeddings of `[tokens]`.

        Raises: InvalidRequest for an id outside the vocabulary, LocalFault if the table is not loaded.
        """
        ...

    def decode(self, payload: memoryview, dtype: str, tokens: int) -> Hidden:
        """Decode hidden states that were received. Raises: ProtocolViolation for an unknown dtype or a payload of another size."""
        ...

    def encode(self, hidden: Hidden, dtype: str, start: int, end: int) -> memoryview:
        """Encode the rows `[start, end)` for the network. The bytes keep no other rows in memory."""
        ...

    def join(self, parts: Sequence[Hidden]) -> Hidden:
        """Put the tokens of several sessions one after the other."""
        ...

    def rows(self, hidden: Hidden, start: int, end: int) -> Hidden:
        """Return the rows `[start, end)`, which may share memory with all rows."""
        ...

    def is_finite(self, hidden: Hidden, start: int, end: int) -> bool:
        """Whether no value of the rows `[start, end)` is NaN or infinite."""
        ...

    def begin(self, hidden: Hidden, segments: Sequence[Segment]) -> Pass:
        """Begin a pass over hidden states of the segments' tokens. Computes nothing."""
        ...

    def forward(self, hidden: Hidden, segments: Sequence[Segment]) -> Hidden:
        """Compute a pass that has all its KV here. Raises: as `Pass.run` does."""
        ...

    def pick(self, hidden: Hidden, requests: Sequence[PickRequest]) -> list[list[Picked] | MeshdError]:
        """Compute final norm and head of `[rows, hidden]`, and sample, as `pick_rows` does.

        Raises: LocalFault if the head is not loaded.
        """
        ...

    def logits(self, hidden: Hidden) -> F32:
        """Compute final norm and head, to be compared with a reference: `[rows, vocab]` in host memory. Raises: as `pick` does."""
        ...


class LoadedLayers(Protocol):
    """Weights in memory, in the backend's own form. Their `WeightSource` must stay open until `close`."""

    @property
    def layers(self) -> LayerRange: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory now, with those that only stages over parts of the layers need."""
        ...

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        """Predict the bytes of weights that stages over these parts of the layers need beside those of a stage over all of them."""
        ...

    def stage(self, layers: LayerRange) -> Stage:
        """Make a stage over some of the loaded layers, which shares their weights.

        A stage over a part of the layers may read further weights first, for seconds. They are freed with the last stage that uses
        them. Any thread may make stages, one at a time.

        Raises: LocalFault if a layer is not loaded; ModelFileError, OutOfMemory.
        """
        ...

    def close(self) -> None:
        """Free the weights. Idempotent. Stages of these layers must not be used afterwards."""
        ...


class Backend(Protocol):
    """Loads layers with one library on one device."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str:
        """Precision of the activations in products: `f32`, or `int8` for blocks rounded to 8 bits. Part of a numerics id."""
        ...

    @property
    def threads(self) -> int: ...

    def memory_bytes(self, weights: Mapping[str, int]) -> int:
        """Return the bytes that weights take in this backend's own form. `weights`: GGUF kind -> number of weights.

        Raises: ModelFileError for a kind that it can't compute with.
        """
        ...

    def arena(self, budget_bytes: int) -> KvArena:
        """Make the arena for the KV of all sessions, where this backend computes."""
        ...

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
