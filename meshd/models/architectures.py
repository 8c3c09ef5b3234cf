"""The supported architectures by their GGUF names: how each differs from Llama, and how to read its metadata.

The names of metadata keys are those of llama.cpp's converters (https://github.com/ggml-org/llama.cpp, `conversion/`). What they
mean for the computation follows the models' code in `transformers`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue, TensorInfo
from meshd.tensors import projections
from meshd.types import ModelSpec, RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How an architecture differs from Llama in ways that the metadata does not state."""

    spec: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields of `ModelSpec`."""
    window_pattern: int = 0
    """n: if the metadata has a window but no pattern, every n-th layer attends to all tokens. 0: all layers have the window."""
    scales_windowed_rope: bool = True
    """Whether RoPE scaling also applies to layers with a window."""
    whole_bounds: bool = True
    """Whether the bounds of YaRN's ramp are rounded to whole indices of frequencies."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    hidden_scale_layers: int = 0
    """Identifies, by its number of layers, the model that scales attention scores by `(hidden / heads) ** -0.5` instead of
    `head_dim ** -0.5`: Gemma 2 27B and Gemma 3 27B. 0: the architecture has no such model."""


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
    "gemma2": Architecture(spec=_GEMMA, window_pattern=2, scaled_embedding=True, hidden_scale_layers=46),
    "gemma3": Architecture(spec=_GEMMA_3, window_pattern=6, scaled_embedding=True, hidden_scale_layers=62),
    "phi3": Architecture(spec=_HALVES | {"fused": ("attn_qkv", "ffn_up")}),
    "granite": Architecture(),
    "olmo2": Architecture(spec=_OLMO, window_pattern=4, scales_windowed_rope=False),  # OLMo 3 too
    "gpt-oss": Architecture(spec=_GPT_OSS, window_pattern=2, whole_bounds=False),
}
"""Keys are values of GGUF's `general.architecture`."""

_PREDICTION = re.compile(r"blk\.(\d{1,6})\.nextn\.")
_BIASES = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_UNSUPPORTED_HINT = "meshd can't run this model yet; README says which it can"


def spec_from_metadata(name: str, metadata: Mapping[str, MetadataValue], tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Read a model's structure from its metadata. `name` is for error messages.

    Raises: ModelFileError for an unsupported architecture, or for metadata that do not describe a valid network.
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
        raise keys.wrong("attention.head_count_kv", f"{heads} heads can't be divided evenly among {kv_heads} KV heads")
    blocks, experts = keys.count("block_count"), keys.count("expert_count", 0)
    if blocks > len(tensors):  # before memory is allocated for each layer
        raise ModelFileError(f"{name} can't be run: it has only {len(tensors)} tensors for {blocks} layers")
    ahead = prediction_layers(tensors)
    layers = min(blocks, ahead.start) if ahead else blocks
    if ahead and (ahead.stop < blocks or not layers):
        raise keys.wrong("block_count", f"layer {ahead.stop - 1} predicts several tokens ahead, but is not the last of {blocks}")
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
        "attention_scale": keys.positive(
            "attention.scale", (hidden // heads) ** -0.5 if layers == about.hidden_scale_layers else 0.0
        ),
        "attention_soft_cap": keys.positive("attn_logit_softcapping", 0.0),
        "logit_soft_cap": keys.positive("final_logit_softcapping", 0.0),
        "embedding_scale": keys.positive("embedding_scale", math.sqrt(hidden) if about.scaled_embedding else 1.0),
        "residual_scale": keys.positive("residual_scale", 1.0),
        "logit_scale": 1 / keys.positive("logit_scale", 1.0),
        "experts": experts,
        "experts_used": keys.count("expert_used_count") if experts else 0,
    }
    fields |= {**about.spec} | _rope(keys, about, head_dim) | _window(keys, about, layers, blocks)
    biases = (part for part in _BIASES if f"blk.0.{part}.bias" in tensors)
    fields["biases"] = tuple(dict.fromkeys((*fields.get("biases", ()), *biases)))
    if fields["experts_used"] > experts:
        raise keys.wrong("expert_used_count", f"{fields['experts_used']} is more than the model's {experts} experts")
    spec = ModelSpec(**fields)
    if unknown := [part for part in spec.biases if part not in projections(spec)]:
        raise ModelFileError(f"{name} can't be run: {keys.architecture} has no projection {unknown[0]}, but the file has its bias")
    return _limited_to_short_factors(spec, keys, tensors)


def prediction_layers(tensors: Iterable[str]) -> range:
    """Return the layers that predict several tokens ahead (MTP), which GGUF counts among the model's and puts after the others.

    llama.cpp names their extra tensors `blk.N.nextn.*`.
    """
    found = {int(match[1]) for name in tensors if (match := _PREDICTION.match(name))}
    return range(min(found), max(found) + 1) if found else range(0)


def _rope(keys: "_Keys", about: Architecture, head_dim: int) -> dict[str, Any]:
    rope_dim = keys.count("rope.dimension_count", head_dim)
    if rope_dim > head_dim or rope_dim % 2:
        raise keys.wrong("rope.dimension_count", f"{rope_dim} is not an even number of at most {head_dim} dimensions")
    fields: dict[str, Any] = {
        "rope_theta": keys.positive("rope.freq_base", 10000.0),
        "rope_dim": 0 if rope_dim == head_dim else rope_dim,
        "rope_magnitude": keys.positive("rope.scaling.attn_factor", 1.0),
    }
    if windowed := keys.positive("rope.freq_base_swa", 0.0 if about.scales_windowed_rope else fields["rope_theta"]):
        fields["rope_theta_windowed"] = windowed
    kind, factor = keys.text("rope.scaling.type", "none"), keys.positive("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.wrong("rope.scaling.type", f"{kind!r} is not among none, linear, yarn, longrope")
    if kind in ("linear", "yarn") and factor != 1.0:
        fields["rope_scaling"] = RopeScaling(
            kind=kind,
            factor=factor,
            original_context=keys.count("rope.scaling.original_context_length", 0 if kind == "linear" else None),
            beta_fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
            whole_bounds=about.whole_bounds,
        )
        if kind == "yarn":
            fields["rope_magnitude"] *= 0.1 * math.log(factor) + 1
    return fields


def _window(keys: "_Keys", about: Architecture, layers: int, blocks: int) -> dict[str, Any]:
    window = keys.count("attention.sliding_window", 0)
    pattern = keys.metadata.get(keys.full("attention.sliding_window_pattern"), about.window_pattern)
    if not window:
        return {"rope_theta_windowed": 0.0}
    if isinstance(pattern, tuple):
        if len(pattern) not in (layers, blocks):
            raise keys.wrong("attention.sliding_window_pattern", f"it has {len(pattern)} values for {layers} layers")
        return {"window": window, "windowed": tuple(map(bool, pattern[:layers]))}
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 0:
        raise keys.wrong("attention.sliding_window_pattern", f"{pattern!r} is not a number of layers")
    return {"window": window, "windowed": tuple((layer + 1) % pattern != 0 for layer in range(layers)) if pattern else ()}


def _limited_to_short_factors(spec: ModelSpec, keys: "_Keys", tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Limit the context of a model with short and long RoPE factors to the range of the short ones: meshd uses only these."""
    if "rope_factors_short.weight" not in tensors:
        return spec
    original_context = keys.count("rope.scaling.original_context_length")
    return msgspec.structs.replace(spec, context_length=min(spec.context_length, original_context))


class _Keys:
    """Reads checked values from the metadata. Its methods take keys without the architecture's prefix.

    Methods that read a value raise ModelFileError if it is missing or invalid.
    """

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
        """Read a positive integer. 0 is allowed only if it is the default."""
        value = self._of_all_layers(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < (1 if default != 0 else 0):
            raise self.wrong(key, "it is missing" if value is None else f"{value!r} is not a positive integer")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Read a positive number. 0 is allowed only if it is the default."""
        value = self._of_all_layers(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf or value == default == 0):
            raise self.wrong(key, "it is missing" if value is None else f"{value!r} is not a positive number")
        return float(value)

    def _of_all_layers(self, key: str, default: MetadataValue | None) -> MetadataValue | None:
        """Read a value that a file may state once for all layers, or once for each."""
        value = self.metadata.get(self.full(key), default)
        if not isinstance(value, tuple) or not value:
            return value
        if any(other != value[0] for other in value):
            shown = ", ".join(map(str, value[:12])) + (", ..." if len(value) > 12 else "")
            raise self.wrong(key, f"the layers differ ({shown}), and meshd runs only models whose layers are alike")
        return value[0]

    def text(self, key: str, default: str) -> str:
        value = self.metadata.get(self.full(key), default)
        if not isinstance(value, str):
            raise self.wrong(key, f"{value!r} is not a text")
        return value

    def same(self, key: str, expected: int) -> int:
        """Check that a value is absent or `expected`, the only supported one. Returns: `expected`."""
        value = self._of_all_layers(key, expected)
        if value != expected:
            raise self.wrong(key, f"{value!r} is not {expected!r}, the only value that is supported yet")
        return expected

    def wrong(self, key: str, why: str) -> ModelFileError:
        return ModelFileError(f"{self._name} can't be run: metadata key {self.full(key)!r}: {why}", hint=_UNSUPPORTED_HINT)
