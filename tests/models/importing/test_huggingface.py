"""The mapping of a Hugging Face folder to GGUF: what is not supported is refused."""

import json
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.importing.huggingface import plan_import
from tiny.hf_folders import CONFIG, weights
from tiny.models import TinyModel


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config.json of a model with experts."""
    folder = tmp_path_factory.mktemp("config")
    TinyModel.make("qwen3moe", folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_an_unknown_model_type_is_refused_by_name() -> None:
    with pytest.raises(ModelFileError, match=r"'mamba'.*llama.*gemma3"):
        plan_import({"model_type": "mamba"}, {})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_an_unsupported_setting_is_refused(config: dict[str, Any], settings: dict[str, object], named: str) -> None:
    config = config | settings | ({"rope_parameters": None} if "rope_scaling" in settings else {})
    with pytest.raises(ModelFileError, match=named):
        plan_import(config, {})


def test_an_unknown_tensor_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=r"extra\.weight"):
        plan_import(config, {"model.layers.1.extra.weight": ("F32", (3,))})


TENSORS = {name: ("F32", array.shape) for name, array in weights().items()}


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq (quantization_config in config.json)"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization": {"group_size": 32, "bits": 4}}, "mlx (quantization in config.json)"),
        ({"compression_config": {"format": "pack-quantized"}}, "an unknown method (compression_config in config.json)"),
    ],
)
def test_weights_in_another_tools_quantisation_are_refused_by_its_name(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        plan_import(CONFIG | setting, TENSORS)
    assert f"quantised with {named}" in str(caught.value)
    assert "take the original weights (--quant q4 makes them small), or a GGUF file" in str(caught.value)


def test_an_empty_quantisation_is_none() -> None:
    assert plan_import(CONFIG | {"quantization_config": None}, TENSORS).left_out == ()


@pytest.mark.parametrize(
    "extra",
    [
        ("model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight", "model.layers.2.self_attn.q_proj.weight"),
        ("mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight"),
        ("model.mtp.norm.weight",),
        ("model.layers.2.shared_head.norm.weight", "model.layers.3.enorm.weight"),
    ],
)
def test_tensors_that_predict_several_tokens_ahead_are_left_out(extra: tuple[str, ...]) -> None:
    plan = plan_import(CONFIG | {"num_nextn_predict_layers": 1}, TENSORS | dict.fromkeys(extra, ("F32", (64,))))
    assert plan.left_out == tuple(sorted(extra))
    assert plan.tensors == plan_import(CONFIG, TENSORS).tensors


def test_a_further_ordinary_layer_is_not_left_out() -> None:
    with pytest.raises(ModelFileError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight' has no place"):
        plan_import(CONFIG, TENSORS | {"model.layers.2.self_attn.q_proj.weight": ("F32", (64, 64))})
