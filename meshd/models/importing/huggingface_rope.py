"""Convert the rotary position embedding (RoPE) of a config.json to GGUF's keys and tensors."""

import math

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.files.json_values import Config
from meshd.models.importing.plan import ImportTensor

Keys = dict[str, MetadataValue]
_BETAS = {"fast": 32.0, "slow": 1.0}


def rope_import(config: Config, head_dim: int) -> tuple[Keys, tuple[ImportTensor, ...]]:
    """Convert a config's RoPE settings.

    Returns: keys without the architecture's prefix, and tensors of frequency factors.
    Raises: ModelFileError for scaling that is not supported.
    """
    rope = config.section("rope_parameters") or Config({})
    windowed = rope.section("sliding_attention")
    rope = rope.section("full_attention") or rope
    scaling = config.section("rope_scaling") or rope  # in older configs, scaling has a section of its own
    fraction = next((each.number("partial_rotary_factor") for each in (rope, config) if each.given("partial_rotary_factor")), 1.0)
    rotated_dims = int(head_dim * fraction)
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    keys: Keys = {"rope.dimension_count": rotated_dims, "rope.freq_base": theta}
    if windowed is not None or config.given("rope_local_base_freq"):
        local = windowed or Config({"rope_theta": config.number("rope_local_base_freq")})
        if local.get("rope_type") not in (None, "default"):
            raise ModelFileError("the model can't be imported: its layers with a window have rope scaling, which is not supported")
        keys["rope.freq_base_swa"] = local.number("rope_theta")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return keys, ()
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.number("factor")}, ()
    if kind == "llama3":
        return keys, (_factors("rope_freqs.weight", _llama3(scaling, rotated_dims, theta)),)
    context = config.count("max_position_embeddings")
    original = scaling.count("original_max_position_embeddings", config.count("original_max_position_embeddings", context))
    if original < 2:
        raise ModelFileError("config.json can't be used: original_max_position_embeddings is less than 2")
    factor = scaling.number("factor", max(1.0, context / original))
    keys |= {"rope.scaling.original_context_length": original, "rope.scaling.factor": factor}
    if kind == "yarn":
        magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        keys["rope.scaling.attn_factor"] = _attention_factor(scaling, magnitude) / magnitude
        keys |= {f"rope.scaling.yarn_beta_{end}": scaling.number(f"beta_{end}", usual) for end, usual in _BETAS.items()}
        if scaling.get("truncate") is False and config.get("model_type") != "gpt_oss":
            raise ModelFileError("the model can't be imported: its YaRN ramp is not truncated to whole frequencies")
        return keys | {"rope.scaling.type": "yarn"}, ()
    if kind in ("longrope", "su"):
        stretch = max(1.0, context / original)
        keys["rope.scaling.attn_factor"] = _attention_factor(scaling, math.sqrt(1 + math.log(stretch) / math.log(original)))
        factors = {length: scaling.numbers(f"{length}_factor", rotated_dims // 2) for length in ("short", "long")}
        tensors = tuple(_factors(f"rope_factors_{length}.weight", values) for length, values in factors.items())
        return keys | {"rope.scaling.type": "longrope"}, tensors
    raise ModelFileError(f"the model can't be imported: rope scaling {str(kind)[:40]!r} is none of linear, llama3, yarn, longrope")


def _attention_factor(scaling: Config, usual: float) -> float:
    """Return the factor by which rotated vectors are scaled; `usual` if the config does not set it. Raises: ModelFileError."""
    if scaling.given("attention_factor"):
        return scaling.number("attention_factor")
    if scaling.given("mscale") and scaling.given("mscale_all_dim"):
        raise ModelFileError("the model can't be imported: its rope scaling has mscale and mscale_all_dim, which are not supported")
    return usual


def _factors(name: str, values: tuple[float, ...]) -> ImportTensor:
    return ImportTensor(name, (), (len(values),), values=values)


def _llama3(scaling: Config, rotated_dims: int, theta: float) -> tuple[float, ...]:
    """Compute the divisor of each frequency (Llama 3.1, as in `transformers`): `factor` for low frequencies, 1 for high."""
    factor, context = scaling.number("factor"), scaling.number("original_max_position_embeddings", 8192)
    low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
    if low >= high:
        raise ModelFileError("config.json can't be used: low_freq_factor is not below high_freq_factor")
    divisors = []
    for dimension in range(0, rotated_dims, 2):
        rotations = context * theta ** (-dimension / rotated_dims) / (2 * math.pi)
        smooth = min(max((rotations - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)
