"""GGUF's tokenizer keys: broken ones are refused by name."""

from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf

BASE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ("a", "b", "ab", "<s>", "</s>", "c d"),
    "tokenizer.ggml.token_type": (1, 1, 1, 3, 3, 4),
    "tokenizer.ggml.merges": ("a b",),
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.ggml.add_bos_token": True,
}


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
def test_a_broken_vocabulary_is_refused_by_name(key: str, wrong: object, named: str) -> None:
    with pytest.raises(ModelFileError, match=named):
        tokenizer_from_gguf(BASE | {f"tokenizer.ggml.{key}": wrong})
