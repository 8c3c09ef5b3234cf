import json
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.importing.huggingface import plan_import
from tiny.models import TinyModel


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a model with experts."""
    folder = tmp_path_factory.mktemp("config")
    TinyModel.make("qwen3moe", folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_one_that_is_not_known_is_refused_by_name() -> None:
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
def test_a_network_that_would_be_another_is_refused(config: dict[str, Any], settings: dict[str, object], named: str) -> None:
    config = config | settings | ({"rope_parameters": None} if "rope_scaling" in settings else {})
    with pytest.raises(ModelFileError, match=named):
        plan_import(config, {})


def test_a_tensor_without_a_place_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match=r"extra\.weight"):
        plan_import(config, {"model.layers.1.extra.weight": ("F32", (3,))})
