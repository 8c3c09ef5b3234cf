"""The pre-tokenizer rules, compared with transformers on 10,000 texts that tokenizers often get wrong."""

from typing import Any

import pytest
from transformers import (
    CohereTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    Qwen2Tokenizer,
)
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from texts.reference_tokenizers import STRINGS, Make, check_ids, ids_of, of_class, of_gguf
from tiny import vocabularies as tiny_vocabularies

BYTE_LEVEL: dict[str, Make] = {
    "gpt-2": of_class(GPT2Tokenizer),
    "qwen2": of_class(Qwen2Tokenizer),
    "qwen35": of_class(Qwen3_5Tokenizer),
    "olmo": of_class(GPTNeoXTokenizer),
    "command-r": of_class(CohereTokenizer),
    "dbrx": of_gguf(),
    "llama-bpe": of_gguf(whole_words=True),
    "tekken": of_gguf(whole_words=True),
    "gpt-4o": of_gguf(),
}


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    return tiny_vocabularies.byte_level("gpt-2")


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_every_rule_gives_the_ids_of_transformers(byte_level: dict[str, Any], pre: str) -> None:
    metadata = byte_level | {"tokenizer.ggml.pre": pre}
    check_ids(tokenizer_from_gguf(metadata), ids_of(BYTE_LEVEL[pre](metadata)))


def test_the_strings_distinguish_all_rules(byte_level: dict[str, Any]) -> None:
    seen: dict[str, str] = {}
    for pre in ("smollm", "default", *BYTE_LEVEL):
        tokenizer = tokenizer_from_gguf(byte_level | {"tokenizer.ggml.pre": pre})
        ids = str([tokenizer.encode(text, add_special=False) for text in STRINGS[:2000]])
        assert seen.setdefault(ids, pre) == pre
