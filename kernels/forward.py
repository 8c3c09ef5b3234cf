"""What the stages of every backend share: the embedding, and the drive from layer to layer through attention."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from meshd.errors import InvalidRequest, LocalFault
from meshd.kernels.backend import F32, Attend, Ids, Positions, Projected, Segment
from meshd.kernels.kv import KVPool
from meshd.kernels.threads import one_thread
from meshd.kernels.weights.load import dequantise_rows
from meshd.types import LayerRange, ModelSpec, Tensor


class CutStage(ABC):
    """A stage in pieces between which attention stands; a backend supplies the pieces."""

    def __init__(self, spec: ModelSpec, layers: LayerRange, embedding: Tensor | None, attend: Attend) -> None:
        self._spec = spec
        self._layers = layers
        self._embedding = embedding
        self._attend = attend

    @property
    def layers(self) -> LayerRange:
        return self._layers

    def embed(self, ids: Ids) -> F32:
        """Rows of the table, dequantised one by one. Raises: InvalidRequest, LocalFault."""
        if self._embedding is None:
            raise LocalFault(f"layers {self._layers} were loaded without the embedding table")
        vocab = self._embedding.shape[0]
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
            raise InvalidRequest(f"a token id is outside the vocabulary: it has {vocab} tokens", param="prompt")
        rows = dequantise_rows(self._embedding, ids)
        return rows if self._spec.embedding_scale == 1.0 else rows * np.float32(self._spec.embedding_scale)

    def forward(self, hidden: F32, segments: Sequence[Segment], kv: KVPool, attend: Attend | None = None) -> F32:
        """All layers over a step. Raises: LocalFault if `hidden` is not as large as the segments say, or KV is not finite."""
        one_thread()
        positions = step_positions(segments)
        if hidden.shape != (len(positions), self._spec.hidden):
            expected = f"{len(positions)} x {self._spec.hidden}"
            raise LocalFault(f"a step can't be computed: its activation is {hidden.shape}, its segments ask for {expected}")
        attend = attend or self._attend
        projected = self.project(hidden, positions)
        for layer in range(self._layers.start, self._layers.end - 1):
            mixed = attend(layer, projected, segments, kv)
            projected = self.mix_project(layer, mixed, projected.residual, positions)
        mixed = attend(self._layers.end - 1, projected, segments, kv)
        return self.mix(mixed, projected.residual)

    @abstractmethod
    def project(self, hidden: F32, positions: Positions) -> Projected: ...

    @abstractmethod
    def mix_project(self, layer: int, mixed: F32, residual: F32, positions: Positions) -> Projected: ...

    @abstractmethod
    def mix(self, mixed: F32, residual: F32) -> F32: ...

    @abstractmethod
    def logits(self, hidden: F32) -> F32: ...


def step_positions(segments: Sequence[Segment]) -> Positions:
    """The position of every token of a step."""
    return np.concatenate([np.arange(s.start, s.start + s.tokens, dtype=np.int64) for s in segments])
