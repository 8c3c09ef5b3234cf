"""Which models could answer: decided from the header alone, with an error that says what to take instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.check import check_model, notes_on
from meshd.models.files.gguf import GgufFile
from tiny.gguf_file import HIDDEN, set_kind, write_gguf


def check(path: Path) -> GgufFile:
    """Check a file by its header, as if nothing else of it were here."""
    with GgufFile.open(path) as file:
        header = GgufFile.from_header(file.header_bytes(), str(path))
    check_model(header)
    return header


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an architecture that is not computed": ({"architecture": "falcon"}, "its architecture 'falcon' is not among llama"),
    "an unknown pre-tokenizer": ({"tokenizer__ggml__pre": "of-tomorrow"}, "pre-tokenizer 'of-tomorrow'"),
    "an unknown kind of tokenizer": ({"tokenizer__ggml__model": "t5"}, "tokenizer kind 't5'"),
    "no tokenizer": ({"tokenizer__ggml__model": None}, "tokenizer kind None"),
    "a merge of unknown tokens": ({"tokenizer__ggml__merges": ["zz yy"]}, r"tokenizer\.ggml\.merges"),
    "a broken template": ({"tokenizer__chat_template": "{% for m in %}"}, "template"),
    "a projector": ({"architecture": "clip"}, r"projector .*take the file of the model itself"),
    "a projector by its type": ({"general__type": "mmproj"}, "projector"),
    "an importance matrix": ({"general__type": "imatrix"}, "importance matrix"),
    "an adapter": ({"general__type": "adapter"}, "adapter"),
    "part 1 of 3 under another name": (
        {"split__count": 3, "split__no": 0},
        r"it is part 1 of 3 of a split file; put all parts into one folder, named NAME-00001-of-00003\.gguf",
    ),
    "layers with different numbers of KV heads": (
        {"llama__attention__head_count_kv": [2, 1, 2]},
        r"head_count_kv': the layers differ \(2, 1, 2\)",
    ),
    "layers with different widths": ({"llama__feed_forward_length": [1024, 512, 1024]}, r"the layers differ \(1024, 512, 1024\)"),
    "a tensor too many": ({"extra": {"blk.0.attn_q.bias2": (4,)}}, r"tensor blk\.0\.attn_q\.bias2 has no place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_could_not_answer_is_refused_with_one_error_that_names_the_file(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", layers=3, **changes)
    with pytest.raises(ModelFileError, match=message) as caught:
        check(path)
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (40, "NVFP4"),
        (41, "Q1_0"),
        (42, "Q2_0"),
        (31, "Q4_0_4_4"),
        (99, "number 99, which is newer than this version"),
        (11, "Q3_K"),
        (10, "Q2_K"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (34, "TQ1_0"),
    ],
)
def test_a_kind_that_is_not_computed_is_named_and_another_is_advised(number: int, kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", layers=2)
    set_kind(path, "blk.1.ffn_up.weight" if number not in (10, 11, 23, 34) else "blk.1.ffn_down.weight", number)
    with pytest.raises(ModelFileError) as caught:
        check(path)
    text = str(caught.value)
    assert f"is of kind {kind}, and meshd can't compute it; take the model in another quantisation" in text
    assert "damaged" not in text


def test_a_usable_model_passes(tmp_path: Path) -> None:
    assert notes_on(check(write_gguf(tmp_path / "m.gguf", layers=2))) == []
    assert notes_on(check(write_gguf(tmp_path / "n.gguf", layers=2, tokenizer__chat_template=None))) == []


def test_equal_values_for_each_layer_are_one_value(tmp_path: Path) -> None:
    keys = {
        "llama__attention__head_count_kv": [2, 2],
        "llama__attention__head_count": [4, 4],
        "llama__feed_forward_length": [1024] * 2,
    }
    with GgufFile.open(write_gguf(tmp_path / "m.gguf", layers=2, **keys)) as file:
        spec = check_model(file).spec
    assert (spec.heads, spec.kv_heads, spec.ffn) == (4, 2, 1024)


def ahead(layer: int) -> dict[str, tuple[int, ...]]:
    return {f"blk.{layer}.nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN), f"blk.{layer}.nextn.enorm.weight": (HIDDEN,)}


@pytest.mark.parametrize("whole_layer", [True, False])
def test_layers_that_predict_several_tokens_ahead_are_ignored_and_said_to_be(whole_layer: bool, tmp_path: Path) -> None:
    """llama.cpp counts them in block_count, and gives them the parts of an ordinary layer too."""
    layers = 3 if whole_layer else 2
    path = write_gguf(tmp_path / "m.gguf", layers=layers, extra=ahead(2), llama__nextn_predict_layers=1, llama__block_count=3)
    with GgufFile.open(path) as file:
        assert check_model(file).spec.layers == 2
        [note] = notes_on(file)
    assert f"{11 if whole_layer else 2} tensors that predict several tokens ahead (MTP, nextn) are ignored" in note


def test_a_predicting_layer_must_be_the_last(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="layer 0 predicts several tokens ahead, but is not the last of 2"):
        check(write_gguf(tmp_path / "m.gguf", layers=2, extra=ahead(0)))


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b""), lambda path: path.write_text("<!doctype html>" * 20)])
def test_a_file_that_is_no_gguf_is_refused(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match=r"m\.gguf"):
        check(tmp_path / "m.gguf")
