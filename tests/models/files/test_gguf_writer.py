"""Files of the GGUF writer, read by meshd's reader and by the gguf package."""

import io
from pathlib import Path

import gguf
import numpy as np
import pytest

from meshd.errors import ModelFileError
from meshd.models.files.gguf import GgufFile
from meshd.models.files.gguf_writer import GgufWriter, OutTensor


def test_every_kind_of_metadata_is_written_and_read_back(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "x", "text": "é\0", "yes": True, "small": 7, "large": 1 << 40, "minus": -7, "far": -(1 << 40),
        "half": 0.5, "words": ("a", "", "é"), "numbers": (1, -2), "wide": (1, 1 << 40), "flags": (True, False),
        "floats": (0.5, 2.0), "none": (), "nested": ((1, 2), (3,)), "general.alignment": 64,
    }  # fmt: skip
    values = np.arange(33, dtype=np.float32)
    tensors = [OutTensor("a", "F32", (33,), lambda: [values]), OutTensor("b", "F16", (1, 1), lambda: [bytes(2)])]
    with (tmp_path / "x.gguf").open("wb") as out:
        GgufWriter(metadata, tensors, "x").write(out, lambda _: None)
    with GgufFile.open(tmp_path / "x.gguf") as file:
        assert dict(file.metadata) == metadata
        np.testing.assert_array_equal(np.frombuffer(file.tensor("a").data, np.float32), values)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {key: reader.get_field(key).contents() for key in ("text", "minus", "far", "yes", "half", "words")} == {
        key: list(metadata[key]) if key == "words" else metadata[key] for key in ("text", "minus", "far", "yes", "half", "words")
    }
    with pytest.raises(ModelFileError, match=r"'a' .*4 bytes, not 132"):
        GgufWriter({}, [OutTensor("a", "F32", (33,), lambda: [bytes(4)])], "y").write(io.BytesIO(), lambda _: None)
    with pytest.raises(ModelFileError, match="appears twice"):
        GgufWriter({}, [tensors[0], tensors[0]], "y")
    with pytest.raises(ModelFileError, match="'odd' can't be written"):
        GgufWriter({"odd": ("a", 1)}, [], "y")
