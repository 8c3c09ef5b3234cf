"""A small random llama, and its computation in plain numpy on weights that the `gguf` package dequantises."""

from dataclasses import dataclass, field

import gguf
import numpy as np
import numpy.typing as npt

from meshd.kernels import reference
from meshd.kernels.rope import rope_of
from meshd.tensors import ROPE_FACTORS, tensor_shape
from meshd.types import ModelSpec, Tensor

F32 = npt.NDArray[np.float32]


def tiny_spec(*, layers: int = 4, tied: bool = False, architecture: str = "llama") -> ModelSpec:
    """Make a spec in which no two dimensions are equal, so that a mix-up of dimensions fails."""
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        hidden=128,
        heads=6,
        kv_heads=2,
        head_dim=32,
        ffn=224,
        vocab=320,
        context_length=512,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=tied,
    )


@dataclass
class TinyLlama:
    """A weight source. `kinds`: middle of a matrix's name (`attn_v`, ...) -> its kind; others are Q4_1. Vectors are F32."""

    spec: ModelSpec
    seed: int = 0
    kinds: dict[str, str] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name not in ROPE_FACTORS and not (self.spec.tied_head and name == "output.weight")

    def tensor(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def dense(self, name: str) -> F32:
        """Return a tensor as float32, dequantised by the `gguf` package."""
        tensor = self.tensor(name)
        raw = np.frombuffer(tensor.data, np.uint8)
        if tensor.kind == "F32":
            return raw.view(np.float32).reshape(tensor.shape)
        rows = raw.reshape(tensor.shape[0], -1)
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind]).reshape(tensor.shape)

    def _make(self, name: str) -> Tensor:
        rng = np.random.default_rng((self.seed, *name.encode()))
        shape = tensor_shape(self.spec, name)
        if len(shape) == 1:
            values = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
            return Tensor(name, "F32", shape, memoryview(values.tobytes()))
        kind = self.kinds.get(name.split(".")[-2], "Q4_1")
        values = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        if name == "token_embd.weight":
            values *= np.float32(np.sqrt(shape[1]))
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        return Tensor(name, kind, shape, memoryview(np.ascontiguousarray(raw).tobytes()))


@dataclass(frozen=True)
class PlainLlama:
    """The whole model in float32 numpy, all tokens at once and no cache."""

    weights: TinyLlama

    def embed(self, ids: npt.NDArray[np.int32]) -> F32:
        return self.weights.dense("token_embd.weight")[ids]

    def hidden(self, ids: npt.NDArray[np.int32]) -> F32:
        """Return the hidden states after the last layer, `[tokens, hidden]`."""
        x = self.embed(ids)
        for layer in range(self.weights.spec.layers):
            x = self._layer(layer, x)
        return x

    def logits(self, hidden: F32) -> F32:
        spec, dense = self.weights.spec, self.weights.dense
        head = dense("token_embd.weight" if spec.tied_head else "output.weight")
        return reference.rms_norm(hidden, dense("output_norm.weight"), spec.norm_eps) @ head.T

    def _layer(self, layer: int, x: F32) -> F32:
        spec = self.weights.spec

        def w(part: str) -> F32:
            return self.weights.dense(f"blk.{layer}.{part}.weight")

        normed = reference.rms_norm(x, w("attn_norm"), spec.norm_eps)
        cos, sin = rope_of(spec).rows(np.arange(len(x)))
        q = reference.rotate((normed @ w("attn_q").T).reshape(len(x), spec.heads, -1), cos, sin)
        k = reference.rotate((normed @ w("attn_k").T).reshape(len(x), spec.kv_heads, -1), cos, sin)
        v = (normed @ w("attn_v").T).reshape(len(x), spec.kv_heads, -1)
        mixed, _ = reference.attend_part(q, k, v, np.tril(np.ones((len(x), len(x)), bool)))
        x = x + mixed.reshape(len(x), -1) @ w("attn_output").T
        normed = reference.rms_norm(x, w("ffn_norm"), spec.norm_eps)
        return x + reference.swiglu(normed @ w("ffn_gate").T, normed @ w("ffn_up").T) @ w("ffn_down").T
