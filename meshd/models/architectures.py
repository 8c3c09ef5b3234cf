"""The supported architectures by their GGUF names: how each differs from Llama, and how to read its metadata.

The names of keys follow llama.cpp's converters (https://github.com/ggml-org/llama.cpp, `conversion/`), their meaning follows the
models' code in `transformers`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue, TensorInfo
from meshd.tensors import projections
from meshd.types import ModelSpec, RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a network differs from Llama's where the metadata does not state it."""

    spec: Mapping[str, Any] = field(default_factory=dict)
    """Values for fields of `ModelSpec`."""
    window_pattern: int = 0
    """Where the metadata gives a window but no pattern: of so many layers the last attends to all tokens; 0: none does."""
    stretches_windowed: bool = True
    """RoPE scaling applies to layers with a window too."""
    whole_bounds: bool = True
    """The bounds of YaRN's ramp are rounded to whole dimensions."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    unlike_layers: int = 0
    """Number of layers of its largest model, which scales scores by `(hidden / heads) ** -0.5` although its head size differs."""


_HALVES: dict[str, Any] = {"rope_halves": True}
_GEMMA = _HALVES | {"post_norm": True, "activation": "gelu_tanh"}
_GEMMA_3 = _GEMMA | {"qk_norm": "head", "rope_theta_windowed": 10000.0}
_OLMO = _HALVES | {"qk_norm": "all", "pre_norm": False, "post_norm": True}
_GPT_OSS = _HALVES | {
    "sinks": True,
    "activation": "clamped",
    "ffn_norm": "post_attention_norm",
    "biases": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),  # Llama 1 to 3, Mistral, Mixtral, SmolLM2
    "smollm3": Architecture(spec={"unrotated_every": 4}),
    "qwen2": Architecture(spec=_HALVES | {"biases": ("attn_q", "attn_k", "attn_v")}),
    "qwen3": Architecture(spec=_HALVES | {"qk_norm": "head"}),
    "qwen3moe": Architecture(spec=_HALVES | {"qk_norm": "head"}),
    "gemma2": Architecture(spec=_GEMMA, window_pattern=2, scaled_embedding=True, unlike_layers=46),
    "gemma3": Architecture(spec=_GEMMA_3, window_pattern=6, scaled_embedding=True, unlike_layers=62),
    "phi3": Architecture(spec=_HALVES | {"fused": ("attn_qkv", "ffn_up")}),
    "granite": Architecture(),
    "olmo2": Architecture(spec=_OLMO, window_pattern=4, stretches_windowed=False),  # OLMo 3 too
    "gpt-oss": Architecture(spec=_GPT_OSS, window_pattern=2, whole_bounds=False),
}
"""By GGUF's `general.architecture`."""

_BIASES = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_UNSUPPORTED_HINT = "meshd can't run this model yet; README says which it can"


def spec_from_metadata(name: str, metadata: Mapping[str, MetadataValue], tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Read a model's network from its metadata. `name` is for messages.

    Raises: ModelFileError for an unsupported architecture, or for metadata that describe no valid network.
    """
    keys = _Keys(name, metadata)
    about = ARCHITECTURES[keys.architecture]
    table = tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelFileError(f"{name} can't be run: it has no embedding table token_embd.weight")
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    kv_heads = keys.count("attention.head_count_kv", heads)
    head_dim = keys.count("attention.key_length", hidden // heads)
    if heads % kv_heads:
        raise keys.wrong("attention.head_count_kv", f"{heads} heads do not share {kv_heads} evenly")
    layers, experts = keys.count("block_count"), keys.count("expert_count", 0)
    if layers > len(tensors):  # before memory is allocated for each layer
        raise ModelFileError(f"{name} can't be run: it has {len(tensors)} tensors for {layers} layers")
    fields: dict[str, Any] = {
        "architecture": keys.architecture,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": keys.same("attention.value_length", head_dim),
        "ffn": keys.count("expert_feed_forward_length" if keys.has("expert_feed_forward_length") else "feed_forward_length"),
        "vocab": table.shape[0],
        "context_length": keys.count("context_length"),
        "norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "tied_head": "output.weight" not in tensors,
        "attention_scale": keys.positive("attention.scale", (hidden // heads) ** -0.5 if layers == about.unlike_layers else 0.0),
        "attention_soft_cap": keys.positive("attn_logit_softcapping", 0.0),
        "logit_soft_cap": keys.positive("final_logit_softcapping", 0.0),
        "embedding_scale": keys.positive("embedding_scale", math.sqrt(hidden) if about.scaled_embedding else 1.0),
        "residual_scale": keys.positive("residual_scale", 1.0),
        "logit_scale": 1 / keys.positive("logit_scale", 1.0),
        "experts": experts,
        "experts_used": keys.count("expert_used_count") if experts else 0,
    }
    fields |= {**about.spec} | _rope(keys, about, head_dim) | _window(keys, about, layers)
    biases = (part for part in _BIASES if f"blk.0.{part}.bias" in tensors)
    fields["biases"] = tuple(dict.fromkeys((*fields.get("biases", ()), *biases)))
    if fields["experts_used"] > experts:
        raise keys.wrong("expert_used_count", f"{fields['experts_used']} of {experts} experts can't be used")
    spec = ModelSpec(**fields)
    if alone := [part for part in spec.biases if part not in projections(spec)]:
        raise ModelFileError(f"{name} can't be run: {keys.architecture} has a bias {alone[0]}, for which it has no matrix here")
    return _ended_at_factors(spec, keys, tensors)


def _rope(keys: "_Keys", about: Architecture, head_dim: int) -> dict[str, Any]:
    turned = keys.count("rope.dimension_count", head_dim)
    if turned > head_dim or turned % 2:
        raise keys.wrong("rope.dimension_count", f"{turned} of {head_dim} dimensions can't be turned in pairs")
    found: dict[str, Any] = {
        "rope_theta": keys.positive("rope.freq_base", 10000.0),
        "rope_dim": 0 if turned == head_dim else turned,
        "rope_magnitude": keys.positive("rope.scaling.attn_factor", 1.0),
    }
    if windowed := keys.positive("rope.freq_base_swa", 0.0 if about.stretches_windowed else found["rope_theta"]):
        found["rope_theta_windowed"] = windowed
    kind, factor = keys.text("rope.scaling.type", "none"), keys.positive("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.wrong("rope.scaling.type", f"{kind!r} is not among none, linear, yarn, longrope")
    if kind in ("linear", "yarn") and factor != 1.0:
        found["rope_scaling"] = RopeScaling(
            kind=kind,
            factor=factor,
            original_context=keys.count("rope.scaling.original_context_length", 0 if kind == "linear" else None),
            beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
            whole_bounds=about.whole_bounds,
        )
        if kind == "yarn":
            found["rope_magnitude"] *= 0.1 * math.log(factor) + 1
    return found


def _window(keys: "_Keys", about: Architecture, layers: int) -> dict[str, Any]:
    window = keys.count("attention.sliding_window", 0)
    pattern = keys.metadata.get(keys.full("attention.sliding_window_pattern"), about.window_pattern)
    if not window:
        return {"rope_theta_windowed": 0.0}
    if isinstance(pattern, tuple):
        if len(pattern) != layers:
            raise keys.wrong("attention.sliding_window_pattern", f"{len(pattern)} layers are not {layers}")
        return {"window": window, "windowed": tuple(map(bool, pattern))}
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 0:
        raise keys.wrong("attention.sliding_window_pattern", f"{pattern!r} is no number of layers")
    return {"window": window, "windowed": tuple((layer + 1) % pattern != 0 for layer in range(layers)) if pattern else ()}


def _ended_at_factors(spec: ModelSpec, keys: "_Keys", tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Limit the context of a model with short and long RoPE factors: only the short ones are used."""
    if "rope_factors_short.weight" not in tensors:
        return spec
    reach = keys.count("rope.scaling.original_context_length")
    return msgspec.structs.replace(spec, context_length=min(spec.context_length, reach))


class _Keys:
    """An architecture's metadata, checked as it is read."""

    def __init__(self, name: str, metadata: Mapping[str, MetadataValue]) -> None:
        """Raises: ModelFileError for an unsupported architecture."""
        self._name = name
        self.metadata = metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ModelFileError(
                f"{name} can't be run: its architecture {architecture!r} is not among {', '.join(ARCHITECTURES)}",
                hint=_UNSUPPORTED_HINT,
            )
        self.architecture = architecture

    def full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        return self.full(key) in self.metadata

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; 0 only where that is the default."""
        value = self.metadata.get(self.full(key), default)
        if isinstance(value, bool) or not isinstance(value, int) or value < (1 if default != 0 else 0):
            raise self.wrong(key, "it is missing" if value is None else f"{value!r} is no positive integer")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A positive number; 0 only where that is the default."""
        value = self.metadata.get(self.full(key), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf or value == default == 0):
            raise self.wrong(key, "it is missing" if value is None else f"{value!r} is no positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.metadata.get(self.full(key), default)
        if not isinstance(value, str):
            raise self.wrong(key, f"{value!r} is no text")
        return value

    def same(self, key: str, expected: int) -> int:
        value = self.metadata.get(self.full(key), expected)
        if value != expected:
            raise self.wrong(key, f"{value!r} is not {expected!r}, all that can be run yet")
        return expected

    def wrong(self, key: str, why: str) -> ModelFileError:
        return ModelFileError(f"{self._name} can't be run: metadata key {self.full(key)!r}: {why}", hint=_UNSUPPORTED_HINT)
