"""The safetensors reader, on files that the library wrote and on hostile headers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshd.errors import ModelFileError
from meshd.models.files import safetensors_file
from meshd.models.files.safetensors_file import SafetensorsFile, SafetensorsFolder, parse_header
from tiny.hf_folders import save, weights, write_folder

ROW = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_files_of_the_library_are_read_back(tmp_path: Path, dtype: str) -> None:
    path, made = tmp_path / "x.safetensors", weights(dtype)
    save(path, made, dtype)
    file = SafetensorsFile.open(path)
    for name, value in made.items():
        expected = (value.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else value
        assert file.tensors[name].dtype == dtype
        np.testing.assert_array_equal(file.read(name), expected)
        np.testing.assert_array_equal(file.read(name, 3, 7), expected[3:7])
    file.close()
    file.close()


def test_scalars_and_empty_tensors_are_read_whole_and_8_bit_floats_refused(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]},
        "eight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [4, 6]},
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(header, np.float32(2.5).tobytes() + bytes(2)))
    file = SafetensorsFile.open(path)
    assert file.read("scalar") == np.float32(2.5)
    assert file.read("none").shape == (0, 3)
    with pytest.raises(ModelFileError, match="tensor 'eight' is F8_E4M3"):
        file.read("eight")


def test_a_long_read_maps_the_file_again_and_detects_a_replaced_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_REOPEN_BYTES", 16)
    path = tmp_path / "x.safetensors"
    save(path, {"a": np.arange(8, dtype=np.float32).reshape(2, 4)})
    file = SafetensorsFile.open(path)
    file.read("a")
    np.testing.assert_array_equal(file.read("a", 1, 2), [[4, 5, 6, 7]])
    save(tmp_path / "y.safetensors", {"a": np.zeros((2, 8), np.float32)})
    (tmp_path / "y.safetensors").replace(path)
    with pytest.raises(ModelFileError, match="it changed while it was read"):
        file.read("a")
    path.unlink()
    file.close()
    with pytest.raises(ModelFileError, match="No such file"):
        file.read("a")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "its header of 0 bytes"),
        (b"\0" * 8, "its header of 0 bytes"),
        (b"\xff" * 64, "is not within its 64 bytes"),
        (file_of({"a": ROW}, bytes(16), length=1 << 20), "is not within"),
        (file_of(b"[]" + b" " * 8), "not an object"),
        (file_of(b"\xff{}"), "can't be read"),
        (file_of(b'{"a":' * 5000), "nested too deep|can't be read"),
        (file_of(b"[" * 100_000), "nested too deep"),
        (file_of(b'{"a":' + b"1," * 1_000_000 + b"}"), "more than 786,432 items"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' appears twice"),
        (file_of({"a": 3}), "tensor 'a': its entry is not exactly"),
        (file_of({"a": ROW | {"more": 1}}, bytes(16)), "tensor 'a': its entry is not exactly"),
        (file_of({"a": ROW | {"dtype": "F4"}}, bytes(16)), "tensor 'a': its type 'F4'"),
        (file_of({"a": ROW | {"dtype": ["F32"]}}, bytes(16)), "tensor 'a': its type"),
        (file_of({"a": ROW | {"shape": [2, -2]}}, bytes(16)), "tensor 'a': its shape"),
        (file_of({"a": ROW | {"shape": [2.0, 2]}}, bytes(16)), "tensor 'a': its shape"),
        (file_of({"a": ROW | {"shape": [True, 4]}}, bytes(16)), "tensor 'a': its shape"),
        (file_of({"a": ROW | {"shape": [1 << 62, 1 << 62]}}, bytes(16)), "tensor 'a': its shape"),
        (file_of({"a": ROW | {"shape": [1 << 40, 1 << 40]}}, bytes(16)), "tensor 'a': its extent of 16 bytes"),
        (file_of({"a": ROW | {"shape": [1] * 9}}, bytes(16)), "tensor 'a': its shape"),
        (file_of({"a": ROW | {"data_offsets": [16, 0]}}, bytes(16)), "tensor 'a': its extent"),
        (file_of({"a": ROW | {"data_offsets": [-16, 0]}}, bytes(16)), "tensor 'a': its data_offsets"),
        (file_of({"a": ROW | {"data_offsets": [0]}}, bytes(16)), "tensor 'a': its data_offsets"),
        (file_of({"a": ROW}, bytes(15)), "tensor 'a': it ends at byte"),
        (file_of({"a": ROW}, bytes(17)), "1 bytes after tensor 'a' belong to nothing"),
        (file_of({"a": ROW, "b": ROW | {"data_offsets": [8, 24]}}, bytes(24)), "tensor 'b': it overlaps tensor 'a'"),
        (file_of({"a": ROW, "b": ROW | {"data_offsets": [20, 36]}}, bytes(36)), "tensor 'b': it leaves a gap after tensor 'a'"),
        (file_of({"__metadata__": {"a": 3}}), "__metadata__"),
        (file_of({"x" * 600: ROW}, bytes(16)), "longer than"),
        (file_of({"a": ROW | {"shape": [int("9" * 30)]}}, bytes(16)), "tensor 'a': its shape"),
    ],
)  # fmt: skip
def test_the_error_for_a_hostile_header_names_file_and_tensor(data: bytes, why: str) -> None:
    with pytest.raises(ModelFileError, match=why) as caught:
        parse_header(data, "x.safetensors")
    assert caught.value.message.startswith("x.safetensors can't be used: ")
    assert len(caught.value.message) < 1000


def test_metadata_and_empty_tensors_are_accepted() -> None:
    header = {"__metadata__": {"format": "pt"}, "a": ROW, "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}
    assert list(parse_header(file_of(header, bytes(16)), "x")) == ["none", "a"]


def test_a_folder_reads_tensors_from_all_its_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, shards=3)
    with SafetensorsFolder.open(tmp_path) as folder:
        for name, value in weights().items():
            assert folder.tensors[name] == ("F32", value.shape)
            np.testing.assert_array_equal(folder.read(name), value)


def _map(index: dict[str, Any], name: str) -> dict[str, Any]:
    return index | {"weight_map": index["weight_map"] | {"lm_head.weight": name}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda index: _map(index, "../model-00001-of-00002.safetensors"), "no name of a safetensors file beside it"),
        (lambda index: _map(index, "/etc/passwd"), "no name of a safetensors file beside it"),
        (lambda index: _map(index, "gone.safetensors"), r"gone\.safetensors is missing"),
        (lambda index: {"weight_map": index["weight_map"] | {"odd": "model-00001-of-00002.safetensors"}}, "has no tensor 'odd'"),
        (lambda index: _map(index, "model-00002-of-00002.safetensors"), "has no tensor 'lm_head.weight'"),
        (lambda index: {"weight_map": {}}, "weight_map"),
        (lambda index: {"weight_map": {"a": 3}}, "weight_map"),
    ],
)
def test_a_hostile_index_is_a_model_file_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], why: str
) -> None:
    write_folder(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises(ModelFileError, match=why):
        SafetensorsFolder.open(tmp_path)


def test_a_tensor_in_two_shards_and_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, shards=2)
    save(tmp_path / "model-00002-of-00002.safetensors", weights())
    with pytest.raises(ModelFileError, match=r"is in .*00001-of-00002\.safetensors too"):
        SafetensorsFolder.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelFileError, match=r"2 safetensors files and no model\.safetensors\.index"):
        SafetensorsFolder.open(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelFileError, match="no safetensors file") as caught:
        SafetensorsFolder.open(tmp_path)
    assert "pytorch_model.bin is a pickle" in caught.value.hint
