"""Weights of any kind, of which only the size matters."""

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np

from meshd.kernels.weights.kinds import BLOCK_KINDS
from meshd.tensors import ROPE_FACTORS, layer_shapes, tensor_shape
from meshd.types import ModelSpec, Tensor


@dataclass(frozen=True)
class SizedWeights:
    """A weight source with matrices of one kind. Quantised ones have equal blocks; floats are random, because equal pages may take
    no memory. Vectors are F32."""

    spec: ModelSpec
    kind: str

    def __contains__(self, name: str) -> bool:
        return name not in ROPE_FACTORS

    def tensor(self, name: str) -> Tensor:
        shape = tensor_shape(self.spec, name)
        kind = self.kind if len(shape) > 1 else "F32"
        if kind in BLOCK_KINDS:
            raw = np.full(prod(shape) // BLOCK_KINDS[kind].weights * BLOCK_KINDS[kind].size, 1, np.uint8)
        else:
            values = np.random.default_rng(len(name)).standard_normal(prod(shape), dtype=np.float32)
            floats = {"F32": values, "F16": values.astype(np.float16), "BF16": (values.view(np.uint32) >> 16).astype(np.uint16)}
            raw = floats[kind].view(np.uint8)
        return Tensor(name, kind, shape, memoryview(raw))

    def counts(self, layer: int) -> Counter[str]:
        """Number of weights of a layer by kind."""
        counts: Counter[str] = Counter()
        for shape in layer_shapes(self.spec).values():
            counts[self.kind if len(shape) > 1 else "F32"] += prod(shape)
        return counts
