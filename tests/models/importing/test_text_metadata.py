"""Templates and token ids of a Hugging Face folder, as GGUF metadata."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshd.models.files.gguf import GgufFile
from meshd.models.importing.import_model import import_to
from tiny.hf_folders import write_folder


def imported(path: Path, target: Path, quant: str | None = None) -> str:
    return import_to(target, path, quant, lambda _: None, lambda _: None)


def test_templates_are_read_from_all_three_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")

    def found() -> dict[str, Any]:
        imported(folder, tmp_path / "made.gguf")
        with GgufFile.open(tmp_path / "made.gguf") as file:
            return {key[24:]: value for key, value in file.metadata.items() if key.startswith("tokenizer.chat_template")}

    named = [{"name": name, "template": f"{name}!"} for name in ("default", "tool_use", "rag")]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [*named, 3, {"name": []}]}))
    assert found() == {"": "default!", "tool_use": "tool_use!"}
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert found() == {"": "from json"}
    (folder / "chat_template.jinja").write_text("from jinja")
    assert found() == {"": "from jinja"}
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert found() == {}


@pytest.mark.parametrize("named", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_the_eos_token_of_the_tokenizer_configuration_is_first(tmp_path: Path, named: object) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named, "bos_token": "</s>"}))
    imported(folder, tmp_path / "made.gguf")
    with GgufFile.open(tmp_path / "made.gguf") as file:
        found = [file.metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot")]
        assert (found, file.metadata["meshd.eos_token_ids"]) == ([2, 3, 2], (3, 2))
