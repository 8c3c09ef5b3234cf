"""Which files of a repository are the model."""

import pytest

from meshd.errors import DownloadError
from meshd.models.store.catalogue import HubSource, resolve
from meshd.models.store.hub.choose import choose_files

MANY = [f"m-{quant}.gguf" for quant in ("Q3_K_M", "Q4_K_M", "Q4_K_S", "Q8_0", "F16")]
SPLIT = [f"Q4_K_M/m-Q4_K_M-0000{part}-of-00002.gguf" for part in (1, 2)]
FOLDER = ["config.json", "tokenizer.json", "model.safetensors", "README.md"]


def chosen(ref: str, *files: str) -> list[str]:
    [source] = resolve(ref).sources
    assert isinstance(source, HubSource)
    return choose_files(source, files)


@pytest.mark.parametrize(
    ("ref", "files", "expected"),
    [
        ("hf:o/m:Q8_0", MANY, ["m-Q8_0.gguf"]),
        ("hf:o/m:q8_0", MANY, ["m-Q8_0.gguf"]),
        ("hf:o/m@main:Q3_K_M", MANY, ["m-Q3_K_M.gguf"]),
        ("hf.co/o/m:Q8_0", MANY, ["m-Q8_0.gguf"]),
        ("https://huggingface.co/o/m:Q8_0", MANY, ["m-Q8_0.gguf"]),
        ("hf:o/m", MANY, ["m-Q4_K_M.gguf"]),
        ("hf:o/m:latest", MANY, ["m-Q4_K_M.gguf"]),
        ("hf:o/m", ["only.gguf", "README.md"], ["only.gguf"]),
        ("hf:o/m", [*SPLIT, "Q8_0/m-Q8_0.gguf"], SPLIT),
        ("hf:o/m:Q8_0", [*SPLIT, "Q8_0/m-Q8_0.gguf"], ["Q8_0/m-Q8_0.gguf"]),
        ("hf:o/m:UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], ["m-UD-Q4_K_XL.gguf"]),
        ("hf:o/m", ["m-q4_k_m.gguf", "m-q8_0.gguf"], ["m-q4_k_m.gguf"]),
        ("hf:o/m", ["m.Q4_K_M.gguf", "m.Q8_0.gguf"], ["m.Q4_K_M.gguf"]),
        ("hf:o/m", ["m-Q4_K_M.gguf", "mmproj-F16.gguf"], ["m-Q4_K_M.gguf"]),
        ("hf:o/m:F16", ["m-F16.gguf", "mmproj-F16.gguf", "m-mmproj-f16.gguf"], ["m-F16.gguf"]),
        ("hf:o/m", ["m-Q5_K_M.gguf", "imatrix.gguf", "m.imatrix.gguf"], ["m-Q5_K_M.gguf"]),
        ("hf:o/m", FOLDER, ["config.json", "tokenizer.json", "model.safetensors"]),
        ("hf:o/m", [*FOLDER, "m-Q4_K_M.gguf"], ["m-Q4_K_M.gguf"]),
        ("hf:o/m+q4", [*FOLDER, "m-Q4_K_M.gguf"], ["config.json", "tokenizer.json", "model.safetensors"]),
        ("hf:o/m", [*FOLDER, "mmproj.gguf"], ["config.json", "tokenizer.json", "model.safetensors"]),
    ],
)
def test_the_model_is_chosen(ref: str, files: list[str], expected: list[str]) -> None:
    assert chosen(ref, *files) == expected


@pytest.mark.parametrize(
    ("ref", "files", "message"),
    [
        ("hf:o/m:Q5_K_M", MANY, r"no GGUF file in Q5_K_M; its files are m-F16\.gguf, .*; name one, as in hf:o/m:F16"),
        ("hf:o/m", ["a.gguf", "b.gguf"], r"has 2 GGUF files, .*: a\.gguf, b\.gguf; name one, as in hf:o/m:a\.gguf"),
        ("hf:o/m", ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], r"several files in Q4_K_M: a-Q4_K_M\.gguf, b-Q4_K_M\.gguf"),
        ("hf:o/m", ["README.md", "pytorch_model.bin", "config.json"], r"it has only pytorch_model\.bin, which is a pickle"),
        ("hf:o/m", ["README.md"], "it has no GGUF and no safetensors file"),
        ("hf:o/m", ["mmproj-F16.gguf"], r"its GGUF files are no models \(mmproj-F16\.gguf\)"),
        ("hf:o/m", ["x.safetensors"], r"no config\.json beside them"),
        ("hf:o/m:Q8_0", FOLDER, r"no GGUF file in Q8_0, only safetensors; write hf:o/m, with --quant"),
    ],
)
def test_what_names_no_single_model_is_an_error_that_lists_the_choices(ref: str, files: list[str], message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        chosen(ref, *files)
