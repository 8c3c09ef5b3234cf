"""Opening GGUF files, compared with the reader of the `gguf` package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from meshd.errors import ModelFileError
from meshd.models.files.gguf import GgufFile


def test_reads_what_the_reference_reader_reads(smollm2: GgufFile, smollm2_path: Path) -> None:
    oracle = gguf.GGUFReader(smollm2_path)
    for key, field in oracle.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            found = smollm2.metadata[key]
            assert (list(found) if isinstance(found, tuple) else found) == expected, key
    assert [*smollm2.tensors] == [tensor.name for tensor in oracle.tensors]
    for expected in oracle.tensors:
        tensor = smollm2.tensor(expected.name)
        assert tensor.kind == expected.tensor_type.name
        assert tensor.shape == tuple(int(size) for size in reversed(expected.shape))
        assert tensor.data.nbytes == expected.n_bytes
        assert smollm2.tensors[expected.name].offset == expected.data_offset
    last = oracle.tensors[-1]
    assert bytes(smollm2.tensor(last.name).data) == last.data.tobytes()


def test_a_tensor_is_a_read_only_view_that_outlives_the_file_object(make_llama: Any, written: Callable[[bytes], Path]) -> None:
    with GgufFile.open(written(make_llama().build())) as file:
        tensor = file.tensor("output_norm.weight")
    assert tensor.data.readonly
    assert tensor.data.cast("f").tolist() == [2.0] * 8
    with pytest.raises(ModelFileError, match="output_norm"):
        file.tensor("output_norm.weight")
    file.close()


def test_shapes_are_row_major(make_llama: Any, written: Callable[[bytes], Path]) -> None:
    with GgufFile.open(written(make_llama(ffn=12).build())) as file:
        assert file.tensor("blk.1.ffn_up.weight").shape == (12, 8)
        assert "blk.1.ffn_up.weight" in file
        assert "blk.2.ffn_up.weight" not in file


def test_a_header_alone_has_everything_except_the_weights(smollm2: GgufFile) -> None:
    header = smollm2.header_bytes()
    assert len(header) < 2_000_000
    alone = GgufFile.from_header(header)
    assert dict(alone.metadata) == dict(smollm2.metadata)
    assert dict(alone.tensors) == dict(smollm2.tensors)
    assert alone.header_bytes() == header
    with pytest.raises(ModelFileError, match="not open here"):
        alone.tensor("token_embd.weight")


def test_the_error_for_a_missing_tensor_names_it(smollm2: GgufFile) -> None:
    with pytest.raises(ModelFileError, match=r"no tensor 'blk\.99\.attn_q\.weight'"):
        smollm2.tensor("blk.99.attn_q.weight")


def test_empty_and_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for path in (tmp_path / "empty.gguf", tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(ModelFileError, match=str(path)):
            GgufFile.open(path)
