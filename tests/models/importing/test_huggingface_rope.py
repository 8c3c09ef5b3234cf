"""RoPE settings of a config.json, compared with transformers' inverse frequencies."""

import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from meshd.errors import ModelFileError
from meshd.models.files.json_values import Config
from meshd.models.importing.huggingface_rope import rope_import

HEAD_DIM = 16
BASE: dict[str, Any] = {"max_position_embeddings": 8192, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
}  # fmt: skip


def imported(**changes: Any) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    keys, tensors = rope_import(Config(BASE | changes), HEAD_DIM)
    return keys, {tensor.name: tensor.values for tensor in tensors}


def test_without_scaling_there_are_only_a_base_and_the_dimensions() -> None:
    assert imported() == ({"rope.dimension_count": 16, "rope.freq_base": 10000.0}, {})
    assert imported(rope_theta=None)[0]["rope.freq_base"] == 10000.0
    assert imported(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})[0]["rope.freq_base"] == 5e5
    assert imported(partial_rotary_factor=0.5)[0]["rope.dimension_count"] == 8


def test_llama3_factors_give_the_frequencies_of_transformers() -> None:
    _, tensors = imported(rope_scaling=LLAMA3)
    factors = tensors["rope_freqs.weight"]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=8192,
        rope_parameters=LLAMA3 | {"rope_theta": 10000.0},
    )  # fmt: skip
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(plain / np.array(factors), expected.numpy(), rtol=1e-6)
    assert scale == 1.0
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)


def test_linear_and_yarn_need_keys_only() -> None:
    keys, tensors = imported(rope_scaling={"type": "linear", "factor": 4.0})
    assert (keys["rope.scaling.type"], keys["rope.scaling.factor"], tensors) == ("linear", 4.0, {})
    keys, tensors = imported(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048})
    assert keys["rope.scaling.type"] == "yarn"
    assert keys["rope.scaling.attn_factor"] == 1.0
    assert (keys["rope.scaling.yarn_beta_fast"], keys["rope.scaling.yarn_beta_slow"]) == (32.0, 1.0)
    assert tensors == {}
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 2.0}
    assert imported(rope_scaling=given)[0]["rope.scaling.attn_factor"] == pytest.approx(2 / (0.1 * math.log(4) + 1))


def test_longrope_has_a_factor_for_each_frequency() -> None:
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 2048,
    }
    keys, tensors = imported(rope_scaling=scaling)
    assert keys["rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(2048)))
    assert tensors == {"rope_factors_short.weight": (1.0,) * 8, "rope_factors_long.weight": (2.0,) * 8}
    with pytest.raises(ModelFileError, match="long_factor is not a list of 8"):
        imported(rope_scaling=scaling | {"long_factor": [2.0] * 7})


def test_layers_with_a_window_have_a_separate_base() -> None:
    both = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    keys, _ = imported(rope_parameters=both)
    assert (keys["rope.freq_base"], keys["rope.freq_base_swa"]) == (1e6, 1e4)
    assert imported(rope_local_base_freq=5e3)[0]["rope.freq_base_swa"] == 5e3
    with pytest.raises(ModelFileError, match="with a window have rope scaling"):
        imported(rope_parameters=both | {"sliding_attention": {"rope_theta": 1e4, "rope_type": "linear"}})


@pytest.mark.parametrize(
    ("scaling", "why"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope scaling 'dynamic' is none of"),
        ({"rope_type": ["yarn"]}, "is none of"),
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "linear", "factor": -1}, "factor is -1"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor is not below"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1}, "less than 2"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "ramp"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}, "mscale"),
        ([1], "rope_scaling is not an object"),
    ],
)
def test_unsupported_scaling_is_refused(scaling: Any, why: str) -> None:
    with pytest.raises(ModelFileError, match=why):
        imported(rope_scaling=scaling)
