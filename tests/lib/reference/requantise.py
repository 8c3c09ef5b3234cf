"""Rewrites a model's weights in another kind, for tests of kinds that no available file has."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from meshd.models.files.gguf import GgufFile
from reference.originals import dense
from reference.quantisers import quantised

Kind = gguf.GGMLQuantizationType
Quantise = Callable[[npt.NDArray[np.float32], Kind], npt.NDArray[np.uint8]]

SEARCHED = frozenset({"Q4_K", "Q5_K", "Q6_K", "IQ4_NL"})
"""Kinds for which llama.cpp searches for good scales, while `quantisers.py` only rounds. A better quantiser may be passed."""
_FALLBACK = Kind.Q8_0
"""Kind of a matrix whose rows do not consist of whole blocks of the wanted kind."""


def requantise(file: GgufFile, path: Path, kind: str, search: Quantise | None = None) -> dict[str, int]:
    """Write a file with the same model: every matrix in `kind`, vectors in float32, and no vocabulary.

    `search`: quantiser for the kinds in `SEARCHED`; None for that of `quantisers.py`. Returns: kind -> number of its matrices.
    """
    architecture = str(file.metadata["general.architecture"])
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in file.metadata.items():
        if key.startswith(f"{architecture}.") and not isinstance(value, tuple) and key != f"{architecture}.vocab_size":
            writer.add_key_value(key, value, _type(value))
    writer.add_vocab_size(file.tensors["token_embd.weight"].shape[0])
    writer.add_tokenizer_model("no_vocab")
    counts: dict[str, int] = {}
    for name, info in file.tensors.items():
        values = dense(file, name)
        if len(info.shape) == 1:
            writer.add_tensor(name, values)
            continue
        wanted = Kind[kind]
        if info.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = _FALLBACK
        counts[wanted.name] = counts.get(wanted.name, 0) + 1
        made = search(values, wanted) if search and wanted.name in SEARCHED else quantised(values, wanted.name)
        writer.add_tensor(name, made, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


def _type(value: object) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    return kinds[type(value)]
