"""The reference backend: plain torch operators and exact weights.

Precision: a product dequantises a block of rows to float32 and multiplies in float32, so its only error is rounding. Only that
block is in memory in full precision. Activations stay float32.

Threads: the products of a prefill chunk are split by rows among the threads. The products of a single token are too small for that
and use one thread. On the CPU, results don't depend, bit for bit, on the number of threads, nor on how tokens are grouped into
chunks and batches: products take activations in blocks of rows (`trials.py`). Compared with one product of all rows, a prefill step
of 128 tokens takes 1.07 times as long, one of 512 tokens 1.05 times, and the decode of a single token 1.25 times (paired, processor
time, SmolLM2-135M's shapes, one thread).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from meshd.errors import ConfigError, LocalFault
from meshd.kernels.attention.local import LocalAttention
from meshd.kernels.backend import F32, Positions, Progress, Projected, WeightSource
from meshd.kernels.forward import BaseStage
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.rope import Rope
from meshd.kernels.threads import Workers, limit_torch_threads
from meshd.kernels.torch.ops import gated, rms_norm, rotate, soft_capped
from meshd.kernels.torch.products import Device, bits_of, make_product, product_bytes
from meshd.kernels.weights.footprint import memory_bytes
from meshd.kernels.weights.heap import return_freed_memory
from meshd.kernels.weights.layers import NetworkWeights, Projection, mix_experts
from meshd.tensors import norm_names
from meshd.types import LayerRange, ModelSpec, Tensor


class Mlp:
    """A gated MLP."""

    def __init__(self, gate_up: Projection, down: Projection, activation: str, device: Device) -> None:
        self._gate_up, self._down = make_product(gate_up, device), make_product(down, device)
        self._activation = activation
        self.bytes = product_bytes(gate_up) + product_bytes(down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(gated(self._gate_up(x), self._activation))


class Experts:
    """Several MLPs, of which each token uses the few that its router scores highest."""

    def __init__(self, weights: NetworkWeights, layer: int, device: Device) -> None:
        router = weights.router(layer)
        self._device = device
        self._router = make_product(router, device)
        self._used = weights.spec.experts_used
        activation = weights.spec.activation
        self._experts = [Mlp(expert.gate_up, expert.down, activation, device) for expert in weights.experts(layer)]
        self.bytes = product_bytes(router) + sum(expert.bytes for expert in self._experts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        def expert(index: int, rows: F32) -> F32:
            return self._device.to_host(self._experts[index](self._device.to_device(rows)))

        device = self._device
        return device.to_device(mix_experts(device.to_host(x), device.to_host(self._router(x)), self._used, expert))


class Layer:
    """One layer's weights, and its computation before and after attention."""

    def __init__(self, weights: NetworkWeights, layer: int, device: Device) -> None:
        spec = weights.spec
        self._spec = spec
        self._norms = {name: device.upload(weights.norm(layer, name)) for name in norm_names(spec)}
        self._qk_norms = [device.upload(norm) for norm in weights.qk_norms(layer) or ()]
        qkv, output = weights.qkv(layer), weights.attention_output(layer)
        self._qkv, self._output = make_product(qkv, device), make_product(output, device)
        self._mlp: Mlp | Experts = (
            Experts(weights, layer, device)
            if spec.experts
            else Mlp(weights.gate_up(layer), weights.down(layer), spec.activation, device)
        )
        self.rule = weights.rule(layer)
        self.bytes = product_bytes(qkv) + product_bytes(output) + self._mlp.bytes

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute Q, K and V, not yet rotated: `[tokens, hidden]` to `[tokens, heads, head_dim]` each."""
        spec = self._spec
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        q, k, v = torch.split(self._qkv(self._normed(hidden, "attn_norm")), [queries, keys, keys], dim=1)
        heads = [part.reshape(len(hidden), -1, spec.head_dim) for part in (q, k, v)]
        if self._qk_norms:
            normed = (heads[0], heads[1]) if spec.qk_norm == "head" else (q, k)
            for index, (part, weight) in enumerate(zip(normed, self._qk_norms, strict=True)):
                heads[index] = rms_norm(part, weight, spec.norm_eps).view(heads[index].shape)
        return heads[0], heads[1], heads[2]

    def mix(self, mixed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Compute the rest of the layer from the attention's result `mixed`, `[tokens, heads * head_dim]`.

        Returns: `[tokens, hidden]`.
        """
        hidden = self._added(residual, self._normed(self._output(mixed), "post_attention_norm", self._spec.post_norm))
        out = self._mlp(self._normed(hidden, self._spec.ffn_norm))
        return self._added(hidden, self._normed(out, "post_ffw_norm", self._spec.post_norm))

    def _added(self, residual: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        scale = self._spec.residual_scale
        return residual + (change if scale == 1.0 else change * scale)

    def _normed(self, x: torch.Tensor, name: str, apply: bool | None = None) -> torch.Tensor:
        return rms_norm(x, self._norms[name], self._spec.norm_eps) if (self._spec.pre_norm if apply is None else apply) else x


class Head:
    """Final norm and output head."""

    def __init__(self, weights: NetworkWeights, device: Device) -> None:
        (head,) = weights.head()
        self._spec = weights.spec
        self._norm = device.upload(weights.output_norm())
        self._product = make_product(head, device)
        self.bytes = product_bytes(head)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._product(rms_norm(hidden, self._norm, self._spec.norm_eps))
        return soft_capped(logits * self._spec.logit_scale, self._spec.logit_soft_cap)


class TorchStage(BaseStage):
    """Layers as plain torch expressions."""

    def __init__(self, loaded: "TorchLayers", layers: LayerRange) -> None:
        super().__init__(loaded.spec, layers, loaded.embedding, loaded.attend)
        self._loaded = loaded
        self._device = loaded.device

    def project(self, hidden: F32, positions: Positions) -> Projected:
        return self._projected(self._layers.start, self._device.to_device(hidden), positions)

    def mix_project(self, layer: int, mixed: F32, residual: torch.Tensor, positions: Positions) -> Projected:
        return self._projected(layer + 1, self._mixed(layer, mixed, residual), positions)

    def mix(self, mixed: F32, residual: torch.Tensor) -> F32:
        return self._device.to_host(self._mixed(self._layers.end - 1, mixed, residual))

    def head(self, hidden: F32) -> F32:
        if self._loaded.head is None:
            raise LocalFault(f"layers {self._layers} were loaded without the head")
        limit_torch_threads()
        return self._device.to_host(self._loaded.head(self._device.to_device(hidden)))

    def _mixed(self, layer: int, mixed: F32, residual: torch.Tensor) -> torch.Tensor:
        return self._loaded.parts[layer].mix(self._device.to_device(mixed).view(len(mixed), -1), residual)

    def _projected(self, layer: int, hidden: torch.Tensor, positions: Positions) -> Projected:
        part, rope = self._loaded.parts[layer], self._loaded.ropes[layer]
        q, k, v = part.project(hidden)
        if rope is not None:
            cos, sin = (self._device.upload(rows).unsqueeze(1) for rows in rope.rows(positions))
            q, k = (rotate(x, cos, sin, halves=self._spec.rope_halves) for x in (q, k))
        to_host = self._device.to_host
        return Projected(to_host(q), to_host(k), to_host(v), hidden, part.rule)


@dataclass(slots=True)
class TorchLayers:
    """Layers as torch tensors. A stage over any of them takes no further memory."""

    spec: ModelSpec
    layers: LayerRange
    device: Device
    ropes: list[Rope | None]
    attend: LocalAttention
    embedding: Tensor | None
    parts: dict[int, Layer]
    head: Head | None

    @property
    def weight_bytes(self) -> int:
        return sum(part.bytes for part in self.parts.values()) + (self.head.bytes if self.head else 0)

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        """See `LoadedLayers.border_bytes`: the weights of a layer are the same in every stage."""
        return 0

    def stage(self, layers: LayerRange) -> TorchStage:
        if layers not in self.layers or not self.parts:
            raise LocalFault(f"layers {layers} are not loaded: {self.layers if self.parts else 'none'} are")
        return TorchStage(self, layers)

    def close(self) -> None:
        self.parts.clear()
        self.head = self.embedding = None
        return_freed_memory()


class TorchBackend:
    """Plain torch, on the CPU or an accelerator. Attention and KV stay on the CPU."""

    def __init__(self, threads: int, device: str = "cpu") -> None:
        """`device` is torch's name of the device: `cpu`, `cuda` or `mps`. Raises: ConfigError if torch can't use it."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device", hint="install a torch built with CUDA, and a driver that it can use")
        if device == "mps" and not torch.backends.mps.is_available():
            raise ConfigError("torch finds no MPS device", hint="MPS needs a Mac with an Apple processor: choose another backend")
        self.name = "torch" if device == "cpu" else f"torch-{device}"
        self.precision = "f32"
        self.threads = threads
        self._device = Device(device, Workers(threads))

    def memory_bytes(self, weights: Mapping[str, int]) -> int:
        """Return the bytes that weights take as tensors, as `Backend.memory_bytes` does."""
        return memory_bytes(weights, bits_of)

    def arena(self, budget_bytes: int) -> HostArena:
        """Make the arena: attention is computed in host memory."""
        return HostArena(budget_bytes)

    def load(
        self,
        spec: ModelSpec,
        layers: LayerRange,
        weights: WeightSource,
        *,
        embedding: bool,
        head: bool,
        progress: Progress | None = None,
    ) -> TorchLayers:
        source = NetworkWeights(spec, weights)
        source.check()
        parts: dict[int, Layer] = {}
        for layer in layers:
            parts[layer] = Layer(source, layer, self._device)
            if progress:
                progress(len(parts) / (len(layers) + head))
        output = Head(source, self._device) if head else None
        if progress and head:
            progress(1.0)
        table = source.embedding() if embedding else None
        return_freed_memory()
        return TorchLayers(spec, layers, self._device, source.ropes(), LocalAttention(self._device.workers), table, parts, output)
