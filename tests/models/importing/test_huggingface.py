"""The mapping of a Hugging Face folder to GGUF: what is not supported is refused."""

import json
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.importing.huggingface import plan_import
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
