"""GGUF's tokenizer keys: invalid values are refused by the key's name."""

import math
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.models.text.tokenizer.gguf_keys import NORMAL, TokenizerKeys
from texts.gguf_keys import BASE


@pytest.mark.parametrize(
    ("key", "wrong", "named"),
    [
        ("model", "t5", "'t5'.*only gpt2 .*llama"),
        ("model", None, "only gpt2"),
        ("pre", "deepseek-v3", "'deepseek-v3'.*smollm"),
        ("tokens", None, "tokens"),
        ("tokens", (), "tokens"),
        ("tokens", (1, 2), "tokens"),
        ("tokens", ("a",) * 6, "twice"),
        ("token_type", (1,), "token_type"),
        ("merges", None, "merges"),
        ("merges", ("a z",), "merges"),
        ("merges", ("ab",), "merges"),
        ("eos_token_id", 6, "eos_token_id"),
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
    assert (empty.types(2), empty.token("eos_token_id", 2), empty.flag("add_bos_token", True)) == ((NORMAL, NORMAL), None, True)


@pytest.mark.parametrize("value", [-1, 3, True, 1.0, "1", (1,)])
def test_the_token_of_a_role_must_be_in_the_vocabulary(value: Any) -> None:
    assert keys(eos_token_id=2).token("eos_token_id", 3) == 2
    with pytest.raises(ModelFileError, match="no token of its 3"):
        keys(eos_token_id=value).token("eos_token_id", 3)


@pytest.mark.parametrize(
    ("value", "why"), [(None, "not 2 numbers"), ((0.0,), "not 2"), (("a", "b"), "not 2"), ((0.0, math.nan), "NaN")]
)
def test_there_must_be_one_score_for_each_token(value: Any, why: str) -> None:
    assert keys(scores=(0.0, -math.inf)).scores(2) == (0.0, -math.inf)
    with pytest.raises(ModelFileError, match=rf"tokenizer\.ggml\.scores: .*{why}"):
        keys(scores=value).scores(2)


@pytest.mark.parametrize("value", [0, 1, "true", ()])
def test_a_flag_must_be_true_or_false(value: Any) -> None:
    assert keys(add_bos_token=False).flag("add_bos_token", True) is False
    with pytest.raises(ModelFileError, match="neither true nor false"):
        keys(add_bos_token=value).flag("add_bos_token", True)
