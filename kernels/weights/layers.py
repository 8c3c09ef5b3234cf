"""Reads a network's weights by their GGUF names and checks them against the model's dimensions."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from meshd.errors import ModelFileError
from meshd.kernels.backend import AttentionRule, WeightSource
from meshd.kernels.rope import Rope, rope_of
from meshd.kernels.threads import Workers
from meshd.kernels.weights.load import F32, Matrix, check_finite, dequantise, expert_matrix, load_matrix, load_stacked, slice_rows
from meshd.tensors import BEFORE_ATTENTION, ROPE_FACTORS, layer_shapes, tensor_shape
from meshd.types import ModelSpec, Tensor

CLAMP, CLAMPED_SLOPE = 7.0, 1.702
"""Bounds and slope of gpt-oss's activation (https://github.com/openai/gpt-oss, `gpt_oss/torch/model.py`)."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection `[out, in]`: one matrix, or several along `out` where their kinds differ; with or without a bias `[out]`."""

    matrices: tuple[Matrix, ...]
    bias: F32 | None = None

    @property
    def bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices) + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class Expert:
    """The weights of one expert's MLP."""

    gate_up: Projection
    """`[2 * ffn, hidden]`."""
    down: Projection
    """`[hidden, ffn]`."""


@dataclass(frozen=True, slots=True)
class NetworkWeights:
    """Reads the weights of layers. Each method raises ModelFileError for a tensor that is missing, broken or of another shape."""

    spec: ModelSpec
    source: WeightSource

    def check(self) -> None:
        """Check that this version can compute the network. Raises: ModelFileError."""
        spec = self.spec
        if spec.heads % spec.kv_heads:
            raise ModelFileError(f"{spec.heads} heads can't be divided evenly among {spec.kv_heads} KV heads")
        kind = spec.rope_scaling.kind if spec.rope_scaling else "linear"
        known = ("silu", "gelu_tanh", "clamped"), ("", "head", "all"), ("linear", "yarn")
        if any(value not in values for value, values in zip((spec.activation, spec.qk_norm, kind), known, strict=True)):
            raise ModelFileError(
                f"this model can't be computed: its architecture {spec.architecture!r} is not known here",
                hint="update meshd on all peers",
            )

    def ropes(self) -> list[Rope | None]:
        """Make the `Rope` of each layer; layers with the same rotations share one `Rope`. None: the layer has no rotation."""
        spec = self.spec
        factors = next((self._vector(name) for name in ROPE_FACTORS if name in self.source), None)
        full = rope_of(spec, factors)
        windowed = rope_of(spec, factors, windowed=True) if spec.rope_theta_windowed else full
        return [(windowed if spec.window_of(layer) else full) if spec.is_rotated(layer) else None for layer in range(spec.layers)]

    def rule(self, layer: int) -> AttentionRule:
        spec = self.spec
        return AttentionRule(
            scale=spec.attention_scale or spec.head_dim**-0.5,
            window=spec.window_of(layer),
            soft_cap=spec.attention_soft_cap,
            sinks=self._vector(f"blk.{layer}.attn_sinks.weight") if spec.sinks else None,
        )

    def embedding(self) -> Tensor:
        """Read the embedding table `[vocab, hidden]`, as stored in the file."""
        table = self._tensor("token_embd.weight")
        check_finite(table)
        return table

    def norm(self, layer: int, name: str) -> F32:
        """Read a norm by its short name, such as `attn_norm`."""
        return self._vector(f"blk.{layer}.{name}.weight")

    def qkv(self, layer: int) -> Projection:
        """Read Q, K and V as one projection `[(heads + 2 kv_heads) * head_dim, hidden]`."""
        fused = "attn_qkv" in self.spec.fused
        return self._linear(layer, *(("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")))

    def qk_norms(self, layer: int) -> tuple[F32, F32] | None:
        """Read the norms of Q and K.

        Returns: `[head_dim]` each, or `[heads * head_dim]` and `[kv_heads * head_dim]`; None if the model has no such norms.
        """
        if not self.spec.qk_norm:
            return None
        return self.norm(layer, "attn_q_norm"), self.norm(layer, "attn_k_norm")

    def attention_output(self, layer: int) -> Projection:
        """Read the output projection `[hidden, heads * head_dim]`."""
        return self._linear(layer, "attn_output")

    def gate_up(self, layer: int) -> Projection:
        """Read the MLP's gate and up projections as one `[2 * ffn, hidden]`."""
        return self._linear(layer, *(("ffn_up",) if "ffn_up" in self.spec.fused else ("ffn_gate", "ffn_up")))

    def down(self, layer: int) -> Projection:
        """Read the MLP's down projection `[hidden, ffn]`."""
        return self._linear(layer, "ffn_down")

    def router(self, layer: int) -> Projection:
        """Read the router `[experts, hidden]`."""
        return self._linear(layer, "ffn_gate_inp")

    def experts(self, layer: int) -> Iterator[Expert]:
        """Read a layer's experts one at a time, so that the backend can convert each before the next one is in memory."""
        names = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
        tensors = {part: self._tensor(f"blk.{layer}.{name}.weight") for part, name in names.items()}
        biases = {part: self._vector(f"blk.{layer}.{name}.bias") for part, name in names.items() if name in self.spec.biases}
        for index in range(self.spec.experts):
            gate, up, down = (expert_matrix(tensors[part], index) for part in names)
            wide = np.concatenate([biases["gate"][index], biases["up"][index]]) if "gate" in biases else None
            narrow = biases["down"][index].copy() if "down" in biases else None
            yield Expert(Projection(load_stacked([gate, up]), wide), Projection((load_matrix(down),), narrow))

    def counts(self, layer: int, *, before_attention: bool) -> Counter[str]:
        """Count a layer's weights by GGUF kind: those up to its attention, or those after it."""
        counts: Counter[str] = Counter()
        for name in layer_shapes(self.spec):
            short = name.partition(".")[0]
            if short != "attn_sinks" and (short in BEFORE_ATTENTION) is before_attention:
                tensor = self._tensor(f"blk.{layer}.{name}")
                counts[tensor.kind] += prod(tensor.shape)
        return counts

    def output_norm(self) -> F32:
        return self._vector("output_norm.weight")

    def head(self, rows: int | None = None) -> Iterator[Projection]:
        """Read the head `[vocab, hidden]`, in parts of `rows` rows, or whole if None. A tied head is the embedding table."""
        tensor = self._tensor("token_embd.weight" if self.spec.tied_head else "output.weight")
        for first in range(0, self.spec.vocab, rows or self.spec.vocab):
            yield Projection((load_matrix(slice_rows(tensor, first, first + rows if rows else self.spec.vocab)),))

    def _linear(self, layer: int, *names: str) -> Projection:
        """Read tensors as one projection, with the rows of the first tensor first."""
        matrices = load_stacked([self._tensor(f"blk.{layer}.{name}.weight") for name in names])
        if not set(names) & set(self.spec.biases):
            return Projection(matrices)
        parts = [
            self._vector(f"blk.{layer}.{name}.bias")
            if name in self.spec.biases
            else np.zeros(tensor_shape(self.spec, f"blk.{layer}.{name}.weight")[0], np.float32)
            for name in names
        ]
        return Projection(matrices, np.concatenate(parts))

    def _tensor(self, name: str) -> Tensor:
        tensor, shape = self.source.tensor(name), tensor_shape(self.spec, name)
        if tensor.shape != shape:
            raise ModelFileError(f"tensor {name} has shape {tensor.shape}: the model's dimensions ask for {shape}")
        return tensor

    def _vector(self, name: str) -> F32:
        """Read a tensor as float32. Copies it, since torch has no tensors over read-only memory."""
        return dequantise(self._tensor(name)).copy()


def mix_experts(x: F32, scores: F32, used: int, mlp: Callable[[int, F32], F32], workers: Workers | None = None) -> F32:
    """Compute the output of each token's `used` best experts, weighted by the softmax of their scores.

    `x` is `[tokens, hidden]`, `scores` `[tokens, experts]`. `mlp` computes one expert's output for the rows of x that use it; with
    `workers`, several experts run at once. A token's result does not depend on the other tokens: the outputs of its experts are
    added in the order of its own scores.

    Returns: `[tokens, hidden]`.
    """
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :used]
    best = np.take_along_axis(scores, chosen, axis=1)
    shares = np.exp(best - best[:, :1])
    shares /= shares.sum(axis=1, keepdims=True)
    terms = np.empty((used, *x.shape), np.float32)

    def fill(index: int) -> None:
        rows, places = np.nonzero(chosen == index)
        terms[places, rows] = mlp(index, x[rows])

    indices = [int(index) for index in np.unique(chosen)]
    if workers is None:
        for index in indices:
            fill(index)
    else:
        workers.map(fill, indices)
    out: F32 = terms[0] * shares[:, :1]
    for place in range(1, used):
        out += terms[place] * shares[:, place : place + 1]
    return out
