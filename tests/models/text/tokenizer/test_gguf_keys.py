"""GGUF's tokenizer keys: invalid values are refused by the key's name."""

import math
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.models.text.tokenizer.gguf_keys import CONTROL, NORMAL, UNKNOWN, TokenizerKeys
from texts.gguf_keys import BASE


@pytest.mark.parametrize(
    ("key", "wrong", "named"),
    [
        ("model", "t5", "'t5'.*only gpt2 .*llama"),
        ("model", None, "only gpt2"),
        ("pre", "gemma4", "'gemma4'.*does not know this rule"),
        ("pre", "deepseek-v4", "'deepseek-v4'.*split as by one of deepseek-"),
        ("pre", 5, "5 can't be used"),
        ("tokens", None, "tokens"),
        ("tokens", (), "tokens"),
        ("tokens", (1, 2), "tokens"),
        ("tokens", ("a",) * 6, "twice"),
        ("token_type", (1,), "token_type"),
        ("merges", None, "merges"),
        ("merges", ("a z",), "merges"),
        ("merges", ("ab",), "merges"),
        ("bos_token_id", "3", "bos_token_id"),
    ],
)
def test_an_invalid_key_is_refused_by_name(key: str, wrong: object, named: str) -> None:
    with pytest.raises(ModelFileError, match=named):
        tokenizer_from_gguf(BASE | {f"tokenizer.ggml.{key}": wrong})


def keys(**values: Any) -> TokenizerKeys:
    return TokenizerKeys({f"tokenizer.ggml.{key}": value for key, value in values.items()})


def test_a_missing_key_has_a_default() -> None:
    empty = keys()
    assert (empty.types(2), empty.special("eos_token_id", (NORMAL,) * 2)) == ((NORMAL, NORMAL), None)
    assert empty.flag("add_bos_token", True)


@pytest.mark.parametrize("value", [True, 1.0, "1", (1,)])
def test_the_token_of_a_role_must_be_a_number(value: Any) -> None:
    with pytest.raises(ModelFileError, match="no token id"):
        keys(eos_token_id=value).special("eos_token_id", (CONTROL,) * 3)


SPM_TYPES = (UNKNOWN, CONTROL, CONTROL, NORMAL)


@pytest.mark.parametrize(
    ("given", "types", "used", "warns"),
    [
        ({"bos_token_id": 3}, SPM_TYPES, 3, False),
        ({"model": "llama"}, SPM_TYPES, 1, True),
        ({"model": "llama", "bos_token_id": 4}, SPM_TYPES, 1, True),
        ({"model": "llama", "bos_token_id": -1}, SPM_TYPES, 1, True),
        ({"model": "llama", "bos_token_id": 9, "token_type": (1,) * 4}, (NORMAL,) * 4, None, True),
        ({"model": "llama"}, (NORMAL,) * 4, 1, True),
        ({"model": "llama"}, (UNKNOWN,), None, False),
        ({"model": "gpt2"}, (CONTROL,) * 12, 11, True),
        ({"model": "gpt2"}, (CONTROL,) * 3, None, False),
        ({"model": "gpt2", "bos_token_id": 3}, (CONTROL,) * 3, None, True),
    ],
)
def test_a_special_token_that_is_missing_or_out_of_range_has_the_default_of_its_kind(
    given: dict[str, Any], types: tuple[int, ...], used: int | None, warns: bool
) -> None:
    read = keys(**given)
    assert read.special("bos_token_id", types) == used
    assert [("bos_token_id" in warning, str(used or "no token") in warning) for warning in read.warnings] == [(True, True)] * warns


@pytest.mark.parametrize(
    ("value", "why"), [(None, "not 2 numbers"), ((0.0,), "not 2"), (("a", "b"), "not 2"), ((0.0, math.nan), "NaN")]
)
def test_there_must_be_one_score_for_each_token(value: Any, why: str) -> None:
    assert keys(scores=(0.0, -math.inf)).scores(2) == (0.0, -math.inf)
    assert keys(scores=(0, -3)).scores(2) == (0.0, -3.0)
    with pytest.raises(ModelFileError, match=rf"tokenizer\.ggml\.scores: .*{why}"):
        keys(scores=value).scores(2)


def test_tokens_that_are_not_in_use_may_be_empty_or_twice() -> None:
    more: dict[str, Any] = {
        "tokenizer.ggml.tokens": (*BASE["tokenizer.ggml.tokens"], "", "", "zz", "zz", "ab"),
        "tokenizer.ggml.token_type": (*BASE["tokenizer.ggml.token_type"], 5, 1, 5, 5, 5),
    }
    plain, padded = tokenizer_from_gguf(BASE), tokenizer_from_gguf(BASE | more)
    assert padded.encode("ab", add_special=True) == plain.encode("ab", add_special=True) == [3, 2]
    assert (len(plain), len(padded), padded.token_bytes(7), padded.token_bytes(9)) == (6, 11, b"", b"zz")
    with pytest.raises(ModelFileError, match="twice"):
        tokenizer_from_gguf(BASE | more | {"tokenizer.ggml.token_type": (*BASE["tokenizer.ggml.token_type"], 5, 5, 1, 1, 5)})


@pytest.mark.parametrize("missing", [{}, {"tokenizer.ggml.pre": ""}])
def test_a_file_without_a_rule_has_the_general_one_and_a_warning(missing: dict[str, Any]) -> None:
    without = {key: value for key, value in BASE.items() if key != "tokenizer.ggml.pre"} | missing
    found = tokenizer_from_gguf(without)
    assert found.encode("ab", add_special=False) == [2]
    assert "tokenizer.ggml.pre" in found.warnings[0]
    assert tokenizer_from_gguf(BASE).warnings == ()


@pytest.mark.parametrize("value", [0, 1, "true", ()])
def test_a_flag_must_be_true_or_false(value: Any) -> None:
    assert keys(add_bos_token=False).flag("add_bos_token", True) is False
    with pytest.raises(ModelFileError, match="neither true nor false"):
        keys(add_bos_token=value).flag("add_bos_token", True)
