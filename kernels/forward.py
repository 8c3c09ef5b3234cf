"""The base class of every backend's stages: embedding, and the loop over layers and their attention."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from meshd.errors import InvalidRequest, LocalFault
from meshd.kernels.backend import F32, Attend, Ids, Positions, Projected, Segment
from meshd.kernels.kv import KVPool
from meshd.kernels.threads import limit_torch_threads
from meshd.kernels.weights.load import dequantise_rows
from meshd.types import LayerRange, ModelSpec, Tensor


class BaseStage(ABC):
    """Runs a stage's layers; a backend implements what comes before, between and after the attentions."""

    def __init__(self, spec: ModelSpec, layers: LayerRange, embedding: Tensor | None, attend: Attend) -> None:
        self._spec = spec
        self._layers = layers
        self._embedding = embedding
        self._attend = attend

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

    def forward(self, hidden: F32, segments: Sequence[Segment], kv: KVPool, attend: Attend | None = None) -> F32:
        """Compute a step through all layers. Raises: LocalFault if `hidden` does not match the segments, or KV is not finite."""
        limit_torch_threads()
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
    """List the position of every token of a step."""
    return np.concatenate([np.arange(s.start, s.start + s.tokens, dtype=np.int64) for s in segments])
