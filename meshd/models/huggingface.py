"""What the tensors and the configuration of a Hugging Face folder are called in GGUF."""

from collections.abc import Mapping
from typing import Any

from meshd.errors import ModelFileError
from meshd.models.gguf_header import MetadataValue
from meshd.models.import_plan import ImportPlan, ImportTensor
from meshd.models.json_files import shown

_LAYER = {
    "input_layernorm.weight": ("attn_norm.weight", ""),
    "self_attn.q_proj.weight": ("attn_q.weight", "rope_interleave:{heads}"),
    "self_attn.k_proj.weight": ("attn_k.weight", "rope_interleave:{kv_heads}"),
    "self_attn.v_proj.weight": ("attn_v.weight", ""),
    "self_attn.o_proj.weight": ("attn_output.weight", ""),
    "post_attention_layernorm.weight": ("ffn_norm.weight", ""),
    "mlp.gate_proj.weight": ("ffn_gate.weight", ""),
    "mlp.up_proj.weight": ("ffn_up.weight", ""),
    "mlp.down_proj.weight": ("ffn_down.weight", ""),
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def plan_import(config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ImportPlan:
    """How to make a GGUF file of a folder. `tensors`: name -> (type, shape).

    Raises: ModelFileError for what is not known by name.
    """
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelFileError(f"the model can't be imported: its model_type {shown(kind)} is not among llama")
    heads, layers = _count(config, "num_attention_heads"), _count(config, "num_hidden_layers")
    kv_heads = _count(config, "num_key_value_heads", heads)
    hidden = _count(config, "hidden_size")
    head_dim = _count(config, "head_dim", max(1, hidden // heads))
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": _count(config, "max_position_embeddings"),
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": _count(config, "intermediate_size"),
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps"),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": _rope_theta(config),
    }
    names = dict.fromkeys(_OUTSIDE)
    planned: list[ImportTensor] = []
    for name, (_, shape) in tensors.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings") is True:
            continue
        if name in names:
            planned.append(ImportTensor(_OUTSIDE[name], (name,), shape))
            continue
        prefix, _, rest = name.partition(".layers.")
        layer, _, part = rest.partition(".")
        if prefix != "model" or part not in _LAYER or not layer.isdecimal() or int(layer) >= layers:
            if part == "self_attn.rotary_emb.inv_freq":
                continue
            raise ModelFileError(f"the model can't be imported: tensor {shown(name)} has no place in {kind}")
        target, transform = _LAYER[part]
        planned.append(ImportTensor(f"blk.{layer}.{target}", (name,), shape, transform.format(heads=heads, kv_heads=kv_heads)))
    return ImportPlan(metadata, tuple(planned))


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise ModelFileError(f"config.json can't be used: {key} is {shown(value)}, no positive integer")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ModelFileError(f"config.json can't be used: {key} is {shown(value)}, no positive number")
    return float(value)


def _rope_theta(config: Mapping[str, Any]) -> float:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict) or given.get("rope_type", given.get("type", "default")) != "default":
        raise ModelFileError("the model can't be imported: its rope scaling is not known")
    return _number({"rope_theta": given.get("rope_theta", config.get("rope_theta", 10000.0))}, "rope_theta")
