"""Map the tensors and the configuration of a Hugging Face folder to GGUF's names.

The names are those of `transformers`' models and of llama.cpp's converters (https://github.com/ggml-org/llama.cpp, `conversion/`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.files.json_values import Config
from meshd.models.importing.huggingface_rope import rope_import
from meshd.models.importing.plan import ImportPlan, ImportTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """How one `model_type` is converted to GGUF."""

    architecture: str
    interleaved: bool = False
    """Whether the rows of Q and K are reordered: RoPE's pairs are half a head apart in the folder, and adjacent in GGUF."""
    norms_less_one: bool = False
    """Whether the folder stores norm weights minus 1."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Numbers that only some families have in their config: name in config.json -> GGUF's key."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Tensor names that differ from `_PARTS`: Hugging Face's name -> GGUF's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values that the config must have if it sets these keys: meshd computes no other variant of the network."""


_POST_NORM = {"post_attention_layernorm.weight": "post_attention_norm.weight"}
_GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True, settings=_SILU),
    "mistral": Family("llama", interleaved=True, settings=_SILU),
    "mixtral": Family("llama", interleaved=True, settings=_SILU),
    "smollm3": Family("smollm3", interleaved=True, settings=_SILU | {"no_rope_layer_interval": 4}),
    "qwen2": Family("qwen2", settings=_SILU),
    "qwen3": Family("qwen3", settings=_SILU),
    "qwen3_moe": Family("qwen3moe", settings=_SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "gemma2": Family("gemma2", norms_less_one=True, keys=_CAPS, parts=_POST_NORM, settings=_GELU),
    "gemma3_text": Family("gemma3", norms_less_one=True, keys=_CAPS, parts=_POST_NORM, settings=_GELU),
    "phi3": Family("phi3", settings=_SILU),
    "granite": Family("granite", interleaved=True, keys=_GRANITE, settings=_SILU),
    "olmo2": Family("olmo2", parts=_POST_NORM, settings=_SILU),
    "olmo3": Family("olmo2", parts=_POST_NORM, settings=_SILU),
    "gpt_oss": Family("gpt-oss", parts=_POST_NORM, settings=_SILU | {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}),
}
"""`model_type` -> family."""

_PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
}
_PARTS |= {f"self_attn.{part}_norm.weight": f"attn_{part}_norm.weight" for part in "qk"}
for _kind in ("weight", "bias"):
    _PARTS |= {f"self_attn.{part}_proj.{_kind}": f"attn_{part}.{_kind}" for part in "qkv"}
    _PARTS |= {f"mlp.{part}_proj.{_kind}": f"ffn_{part}.{_kind}" for part in ("gate", "up", "down")}
    _PARTS[f"self_attn.o_proj.{_kind}"] = f"attn_output.{_kind}"

_STACKED = {
    "mlp.experts.gate_up_proj": (
        ("ffn_gate_exps.weight", "transpose|slice:1:0::2"),
        ("ffn_up_exps.weight", "transpose|slice:1:1::2"),
    ),
    "mlp.experts.gate_up_proj_bias": (("ffn_gate_exps.bias", "slice:1:0::2"), ("ffn_up_exps.bias", "slice:1:1::2")),
    "mlp.experts.down_proj": (("ffn_down_exps.weight", "transpose"),),
    "mlp.experts.down_proj_bias": (("ffn_down_exps.bias", ""),),
}
"""gpt-oss's tensors that each hold all experts, with gate and up alternating: name -> pairs (GGUF's name, transform)."""
_PACKED = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)_(blocks|scales)")
"""Tensors of gpt-oss in MXFP4."""
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d{1,5})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_EXPERT_PARTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_OUTSIDE = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_LEFT_OUT = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.|.*\.rotary_emb\.inv_freq$")
"""Tensors that are not imported: meshd takes no images, and computes the rotary frequencies itself."""
_PREDICTION = re.compile(r"(?:model\.)?(?:language_model\.)?mtp(?:_layers)?\.")
_PREDICTION_PART = re.compile(r"(?:eh_proj|enorm|hnorm|shared_head|nextn)\b")
"""Names of tensors that predict several tokens ahead, and of parts that only a layer which does so has."""
_PREFIX = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)")
_LAYER = re.compile(r"layers\.(\d{1,6})\.(.+)")


def plan_import(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, Shape]]) -> ImportPlan:
    """Plan how a folder becomes a GGUF file. `tensors`: name -> (type, shape).

    Raises: ModelFileError for a model type, setting or tensor that is not supported.
    """
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
        config = {"tie_word_embeddings": True} | dict(config["text_config"]) | {"model_type": "gemma3_text"}
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelFileError(f"the model can't be imported: its model_type {str(kind)[:80]!r} is not among {known}")
    _check_not_quantised(config, str(kind))
    for key, expected in family.settings.items():
        if config.get(key, expected) not in (expected, None):
            raise ModelFileError(f"the model can't be imported: {key} is {str(config[key])[:80]}; only {expected} is supported")
    checked = Config(config)
    metadata, extra = _metadata(checked, family)
    planner = _TensorPlanner(family, checked)
    left_out = planner.prediction_tensors(tensors)
    return ImportPlan(metadata, (*planner.plan(tensors), *extra), tuple(sorted(left_out)))


def _check_not_quantised(config: Mapping[str, Any], kind: str) -> None:
    """Check that the weights are not in another tool's quantised form. Raises: ModelFileError, which names the form."""
    for key in ("quantization_config", "compression_config", "quantization"):
        about = config.get(key)
        if not isinstance(about, Mapping):
            continue
        method = str(about.get("quant_method") or ("mlx" if key == "quantization" else "an unknown method"))[:80]
        if (kind, method) == ("gpt_oss", "mxfp4"):
            continue
        raise ModelFileError(
            f"the model can't be imported: its weights are quantised with {method} ({key} in config.json), which is not supported",
            hint="take the original weights (--quant q4 makes them small), or a GGUF file of the model",
        )


def _metadata(config: Config, family: Family) -> tuple[dict[str, MetadataValue], tuple[ImportTensor, ...]]:
    """Return the architecture's metadata keys, and the tensors that its rotary embedding needs."""
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    head_dim = config.count("head_dim", max(1, hidden // heads))
    keys: dict[str, MetadataValue] = {
        "block_count": config.count("num_hidden_layers"),
        "context_length": config.count("max_position_embeddings"),
        "embedding_length": hidden,
        "feed_forward_length": config.count("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.count("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
    }
    keys |= {key: config.number(name) for name, key in family.keys.items() if config.given(name)}
    if config.given("query_pre_attn_scalar"):
        keys["attention.scale"] = config.number("query_pre_attn_scalar") ** -0.5
    for name in ("num_local_experts", "num_experts"):
        if config.given(name):
            keys["expert_count"] = config.count(name)
            keys["expert_used_count"] = config.count("num_experts_per_tok")
            keys["expert_feed_forward_length"] = config.count("moe_intermediate_size", config.count("intermediate_size"))
    keys |= _window(config)
    rope_keys, tensors = rope_import(config, head_dim)
    prefixed = {f"{family.architecture}.{key}": value for key, value in (keys | rope_keys).items()}
    return {"general.architecture": family.architecture, **prefixed}, tensors


def _window(config: Config) -> dict[str, MetadataValue]:
    layers = config.count("num_hidden_layers")
    if not config.given("sliding_window") or config.get("use_sliding_window") is False:
        return {}
    window: dict[str, MetadataValue] = {"attention.sliding_window": config.count("sliding_window")}
    types = config.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
            raise ModelFileError(f"config.json can't be used: layer_types are not {layers} of {' and '.join(known)}")
        pattern = tuple(kind == "sliding_attention" for kind in types)
        return window | {"attention.sliding_window_pattern": pattern} if any(pattern) else {}
    if config.given("max_window_layers") and config.get("use_sliding_window") is True:
        first = config.count("max_window_layers")
        return window | {"attention.sliding_window_pattern": tuple(layer >= first for layer in range(layers))}
    if config.given("sliding_window_pattern"):
        return window | {"attention.sliding_window_pattern": config.count("sliding_window_pattern")}
    return window


class _TensorPlanner:
    """Plans GGUF's tensors from Hugging Face's."""

    def __init__(self, family: Family, config: Config) -> None:
        heads = config.count("num_attention_heads")
        self._family = family
        self._layers = config.count("num_hidden_layers")
        self._tied = config.get("tie_word_embeddings")
        self._parts = {**_PARTS, **family.parts}
        self._rope_heads = {"attn_q": heads, "attn_k": config.count("num_key_value_heads", heads)} if family.interleaved else {}
        self._experts: dict[str, dict[int, tuple[str, Shape]]] = defaultdict(dict)

    def plan(self, tensors: Mapping[str, tuple[str, Shape]]) -> list[ImportTensor]:
        """Plan all tensors. Raises: ModelFileError for a tensor that the architecture does not have."""
        planned: list[ImportTensor] = []
        left_out = self.prediction_tensors(tensors)
        for name, (_, shape) in tensors.items():
            if not _LEFT_OUT.match(name) and name not in left_out:
                planned += self._plan_tensor(name, shape)
        for target, experts in self._experts.items():
            if sorted(experts) != list(range(len(experts))):
                raise ModelFileError(f"the model can't be imported: experts of {target} are missing")
            shapes = {shape for _, shape in experts.values()}
            if len(shapes) > 1:
                raise ModelFileError(f"the model can't be imported: experts of {target} have several shapes")
            names = tuple(experts[index][0] for index in range(len(experts)))
            planned.append(ImportTensor(target, names, (len(names), *shapes.pop())))
        return planned

    def prediction_tensors(self, names: Iterable[str]) -> frozenset[str]:
        """Find the tensors that predict several tokens ahead (MTP): `mtp.*`, and extra layers at the end that have such a part."""
        layers: dict[int, list[str]] = defaultdict(list)
        found = {name for name in names if _PREDICTION.match(name)}
        ahead = set()
        for name in names:
            match = _LAYER.fullmatch(_PREFIX.sub("", name))
            if match is not None and int(match[1]) >= self._layers:
                layers[int(match[1])].append(name)
                if _PREDICTION_PART.match(match[2]):
                    ahead.add(int(match[1]))
        return frozenset(found.union(*(layers[layer] for layer in ahead)))

    def _plan_tensor(self, name: str, shape: Shape) -> list[ImportTensor]:
        inner = _PREFIX.sub("", name)
        if inner in _OUTSIDE:
            if inner == "lm_head.weight" and self._tied is True:
                return []
            return [ImportTensor(_OUTSIDE[inner], (name,), shape, self._norm_transform(inner))]
        match = _LAYER.fullmatch(inner)
        if match is None or int(match[1]) >= self._layers:
            raise self._misplaced(name)
        layer, part = int(match[1]), match[2]
        if expert := _EXPERT.fullmatch(part):
            self._experts[f"blk.{layer}.ffn_{_EXPERT_PARTS[expert[2]]}_exps.weight"][int(expert[1])] = name, shape
            return []
        if packed := _PACKED.fullmatch(part):
            return self._plan_mxfp4(layer, name, packed[1], shape) if packed[2] == "blocks" else []
        if part in _STACKED:
            if len(shape) != (2 if part.endswith("bias") else 3):
                raise self._misplaced(name)
            return [
                ImportTensor(f"blk.{layer}.{target}", (name,), _shape_after(shape, steps), steps)
                for target, steps in _STACKED[part]
            ]
        target = self._parts.get(part, "")
        if not target:
            raise self._misplaced(name)
        return [ImportTensor(f"blk.{layer}.{target}", (name,), shape, self._norm_transform(part) or self._rope_transform(target))]

    def _plan_mxfp4(self, layer: int, name: str, part: str, shape: Shape) -> list[ImportTensor]:
        """Plan a tensor of gpt-oss in MXFP4. Its blocks already run along GGUF's rows, so it is not transposed."""
        if len(shape) != 4:
            raise self._misplaced(name)
        sources, weights = (name, name.removesuffix("blocks") + "scales"), (*shape[:-2], shape[-2] * 32)
        targets = [(target, steps.replace("transpose", "mxfp4")) for target, steps in _STACKED[f"mlp.experts.{part}"]]
        return [ImportTensor(f"blk.{layer}.{target}", sources, _shape_after(weights, steps), steps) for target, steps in targets]

    def _norm_transform(self, part: str) -> str:
        return "add_one" if self._family.norms_less_one and part.endswith("norm.weight") else ""

    def _rope_transform(self, target: str) -> str:
        heads = self._rope_heads.get(target.partition(".")[0])
        return f"rope_interleave:{heads}" if heads else ""

    def _misplaced(self, name: str) -> ModelFileError:
        return ModelFileError(f"the model can't be imported: tensor {name[:200]!r} has no place in {self._family.architecture}")


def _shape_after(shape: Shape, steps: str) -> Shape:
    """Return the shape of a tensor of `_STACKED` after its transform."""
    if "transpose" in steps:
        shape = *shape[:-2], *reversed(shape[-2:])
    return (shape[0], shape[1] // 2, *shape[2:]) if "slice" in steps else shape
