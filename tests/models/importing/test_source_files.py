"""Finding the files of a model: split names, folders and indices."""

import json
from pathlib import Path

import pytest

from meshd.errors import ModelFileError
from meshd.models.importing.source_files import INDEX, files_of, needs_import, parts_of, split_names, weight_files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def test_a_split_name_gives_all_its_parts_in_order() -> None:
    names = [f"m-{part:05}-of-00003.gguf" for part in (1, 2, 3)]
    assert [split_names(name) for name in names] == [names] * 3
    for alone in ("m.gguf", "m-1-of-3.gguf", "m-00001-of-00003.safetensors", "-00001-of-00003.gguf"):
        assert split_names(alone) == [alone]
    assert len(split_names("m-00001-of-01024.gguf")) == 1024


@pytest.mark.parametrize(
    "name", ["m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00000-of-00000.gguf", "m-00001-of-01025.gguf"]
)
def test_an_impossible_part_number_is_refused(name: str) -> None:
    with pytest.raises(ModelFileError, match="its name says part"):
        split_names(name)


def test_only_a_whole_gguf_file_is_used_in_place(tmp_path: Path) -> None:
    assert not needs_import(tmp_path / "m.gguf", None)
    assert needs_import(tmp_path / "m.gguf", "q4")
    assert needs_import(tmp_path, None)
    assert needs_import(tmp_path / "m-00001-of-00002.gguf", None)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    touch(tmp_path, first.name)
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf can't be used: this part of the model is missing"):
        parts_of(first)
    touch(tmp_path, second.name)
    assert parts_of(second) == [first, second]
    with pytest.raises(ModelFileError, match="there is no such file"):
        parts_of(tmp_path / "none.gguf")


def test_a_folders_files_are_its_configuration_tokenizer_and_weights(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors", "tokenizer.json", "README.md", "other.bin")
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        files_of(tmp_path)
    touch(tmp_path, "config.json")
    assert [path.name for path in files_of(tmp_path)] == ["config.json", "tokenizer.json", "model.safetensors"]


def test_without_an_index_there_must_be_one_weight_file(tmp_path: Path) -> None:
    touch(tmp_path, "odd.safetensors")
    assert weight_files(tmp_path) == ([tmp_path / "odd.safetensors"], {})
    touch(tmp_path, "more.safetensors")
    with pytest.raises(ModelFileError, match="2 safetensors files and no"):
        weight_files(tmp_path)
    touch(tmp_path, "model.safetensors")
    assert weight_files(tmp_path) == ([tmp_path / "model.safetensors"], {})


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "a/b.safetensors", ".a.safetensors", "a.bin", "", "é.safetensors"]
)
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelFileError, match="no name of a safetensors file beside it"):
        weight_files(tmp_path)


def test_an_index_maps_each_tensor_to_its_file(tmp_path: Path) -> None:
    where = {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    touch(tmp_path, "one.safetensors")
    with pytest.raises(ModelFileError, match=r"two\.safetensors is missing"):
        weight_files(tmp_path)
    touch(tmp_path, "two.safetensors", "third.safetensors")
    assert weight_files(tmp_path) == ([tmp_path / "one.safetensors", tmp_path / "two.safetensors"], where)


def test_a_pickle_is_named_and_not_read(tmp_path: Path) -> None:
    touch(tmp_path, "weights.pt", "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="no safetensors file") as caught:
        weight_files(tmp_path)
    assert "pytorch_model.bin is a pickle" in caught.value.hint
