"""The base class of the backends that keep hidden states and KV in host memory, and the loop over layers and their attention.

    hidden -> project -> (attend -> mix_project)* -> attend -> mix -> hidden

A pass is a generator: it runs until the attention of a layer needs parts that are held elsewhere, and then yields a cut. Where
all KV is here, that costs one comparison a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from meshd.errors import InvalidRequest, LocalFault, MeshdError
from meshd.kernels import wire
from meshd.kernels.attention.local import LocalAttention
from meshd.kernels.attention.remote import merge_attention, remote_requests
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import F32, AttendCut, Done, Hidden, Ids, Pass, Positions, Projected, Segment
from meshd.kernels.sampling.sampler import Picked, PickRequest, pick_rows
from meshd.kernels.threads import limit_torch_threads
from meshd.kernels.weights.load import dequantise_rows
from meshd.types import LayerRange, ModelSpec, Tensor


class HostStage(ABC):
    """The functions of a `Stage` whose hidden states are arrays `[tokens, hidden]` in host memory."""

    width: int
    """Number of values of a hidden state."""

    def decode(self, payload: memoryview, dtype: str, tokens: int) -> F32:
        """Decode hidden states, as `Stage.decode` does. With `f32` they are a view of the payload, read-only if the payload is."""
        return wire.decode(payload, dtype, tokens, self.width)

    def encode(self, hidden: Hidden, dtype: str, start: int, end: int) -> memoryview:
        """Encode rows, as `Stage.encode` does."""
        array = _array(hidden)
        return wire.encode(array if end - start == len(array) else array[start:end].copy(), dtype)

    def join(self, parts: Sequence[Hidden]) -> F32:
        """Put tokens one after the other, as `Stage.join` does."""
        return _array(parts[0]) if len(parts) == 1 else np.concatenate([_array(part) for part in parts])

    def rows(self, hidden: Hidden, start: int, end: int) -> F32:
        """Return rows, as `Stage.rows` does."""
        return _array(hidden)[start:end]

    def is_finite(self, hidden: Hidden, start: int, end: int) -> bool:
        """Check rows, as `Stage.is_finite` does."""
        return bool(np.isfinite(_array(hidden)[start:end]).all())

    def forward(self, hidden: Hidden, segments: Sequence[Segment]) -> F32:
        """Compute a pass that has all its KV here, as `Stage.forward` does."""
        found = self.begin(hidden, segments).run()
        if not isinstance(found, Done):
            raise LocalFault("some KV of this step is held elsewhere: it needs a pass that can wait")
        return _array(found.hidden)

    def pick(self, hidden: Hidden, requests: Sequence[PickRequest]) -> list[list[Picked] | MeshdError]:
        """Compute the head and sample, as `Stage.pick` does."""
        return pick_rows(self.logits(hidden), requests)

    @abstractmethod
    def begin(self, hidden: Hidden, segments: Sequence[Segment]) -> Pass:
        """Begin a pass, as `Stage.begin` does."""

    @abstractmethod
    def logits(self, hidden: Hidden) -> F32:
        """Compute final norm and head, as `Stage.logits` does."""


class BaseStage(HostStage):
    """Runs a stage's layers; a backend implements what comes before, between and after the attentions."""

    def __init__(self, spec: ModelSpec, layers: LayerRange, embedding: Tensor | None, attend: LocalAttention) -> None:
        self.width = spec.hidden
        self._spec = spec
        self._layers = layers
        self._embedding = embedding
        self.attend = attend

    @property
    def layers(self) -> LayerRange:
        return self._layers

    def embed(self, ids: Ids) -> F32:
        """Look up embeddings, as `Stage.embed` does."""
        if self._embedding is None:
            raise LocalFault(f"layers {self._layers} were loaded without the embedding table")
        vocab = self._embedding.shape[0]
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
            raise InvalidRequest(f"a token id is outside the vocabulary: it has {vocab} tokens", param="prompt")
        rows = dequantise_rows(self._embedding, ids)
        return rows if self._spec.embedding_scale == 1.0 else rows * np.float32(self._spec.embedding_scale)

    def begin(self, hidden: Hidden, segments: Sequence[Segment]) -> "LayerPass":
        """Begin a pass, as `Stage.begin` does."""
        return LayerPass(self, _array(hidden), segments)

    def logits(self, hidden: Hidden) -> F32:
        """Compute final norm and head, as `Stage.logits` does."""
        return self.head(_array(hidden))

    @abstractmethod
    def project(self, hidden: F32, positions: Positions) -> Projected:
        """Compute the first layer up to its attention: norm, QKV, rope. `hidden` is `[tokens, hidden]`, `positions` `[tokens]`."""

    @abstractmethod
    def mix_project(self, layer: int, mixed: F32, residual: Any, positions: Positions) -> Projected:
        """Compute `layer` after its attention, then `layer + 1` up to its attention.

        `mixed` is the attention's result `[tokens, heads, head_dim]`, `residual` that of `Projected`.
        """

    @abstractmethod
    def mix(self, mixed: F32, residual: Any) -> F32:
        """Compute the last layer after its attention. Returns: `[tokens, hidden]`."""

    @abstractmethod
    def head(self, hidden: F32) -> F32:
        """Compute final norm and head: `[rows, hidden]` to `[rows, vocab]`. Raises: LocalFault if the head is not loaded."""


class LayerPass:
    """Implements `Pass` for a `BaseStage`."""

    def __init__(self, stage: BaseStage, hidden: F32, segments: Sequence[Segment]) -> None:
        self._stage = stage
        self._segments = segments
        self._dropped: set[int] = set()
        self._cut: AttendCut | None = None
        """The cut that the pass is paused at."""
        self._parts: Sequence[Part | None] = ()
        self._ended = False
        self._layers = self._compute(hidden)

    def run(self) -> AttendCut | Done:
        """Compute up to the next cut, or to the end, as `Pass.run` does."""
        if self._cut is not None or self._ended:
            raise LocalFault("a pass that " + ("has ended" if self._ended else "waits for parts of its attention") + " can't run")
        limit_torch_threads()
        self._ended = True  # if an error ends it
        try:
            self._cut = next(self._layers)
        except StopIteration as done:
            return Done(done.value)
        self._ended = False
        return self._cut

    def give(self, parts: Sequence[Part | None]) -> None:
        """Take the parts of the cut, as `Pass.give` does."""
        cut = self._paused()
        if len(parts) != len(cut.requests):
            raise LocalFault(f"{len(parts)} parts were given for {len(cut.requests)} requests")
        for request, part in zip(cut.requests, parts, strict=True):
            if request.segment not in self._dropped and (part is None or part[0].shape != request.q.shape):
                raise LocalFault(f"a part of the attention of layer {request.layer} is missing, or has another shape")
        self._cut, self._parts = None, parts

    def drop(self, segment: int) -> None:
        """Compute a segment no further, as `Pass.drop` does."""
        self._paused()
        self._dropped.add(segment)

    def _paused(self) -> AttendCut:
        if self._cut is None:
            raise LocalFault("a pass that is not paused takes nothing")
        return self._cut

    def _compute(self, hidden: F32) -> Generator[AttendCut, None, F32]:
        stage, segments = self._stage, self._segments
        positions = step_positions(segments)
        if hidden.shape != (len(positions), stage.width):
            expected = f"{len(positions)} x {stage.width}"
            raise LocalFault(f"a step can't be computed: its activation is {hidden.shape}, its segments ask for {expected}")
        is_split = any(segment.remote for segment in segments)
        layers, attend = stage.layers, stage.attend
        projected = stage.project(hidden, positions)
        for layer in layers:
            mixed = (yield from self._split(layer, projected)) if is_split else attend(layer, projected, segments)
            if layer == layers.end - 1:
                break
            projected = stage.mix_project(layer, mixed, projected.residual, positions)
        return stage.mix(mixed, projected.residual)

    def _split(self, layer: int, projected: Projected) -> Generator[AttendCut, None, F32]:
        """Compute the attention of a layer from what is here and what is held elsewhere."""
        requests = remote_requests(layer, projected, self._segments, self._dropped)
        if requests:
            yield AttendCut(requests)
        parts, self._parts = self._parts, ()
        return merge_attention(layer, projected, self._segments, requests, parts, self._dropped, self._stage.attend)


def step_positions(segments: Sequence[Segment]) -> Positions:
    """List the position of every token of a step."""
    return np.concatenate([np.arange(s.start, s.start + s.tokens, dtype=np.int64) for s in segments])


def _array(hidden: Hidden) -> F32:
    """Raises: LocalFault for hidden states of another backend."""
    if not isinstance(hidden, np.ndarray):
        raise LocalFault("this backend keeps hidden states in host memory, and these are elsewhere")
    return hidden
