"""The pre-tokenizer rules, compared with transformers on 10,000 texts that tokenizers often get wrong."""

import unicodedata
from typing import Any

import pytest
from transformers import (
    CohereTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    Qwen2Tokenizer,
)
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.models.text.tokenizer.pretokenizers import NAMES, pretokenizer_named
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


SPLITS = {
    "deepseek-llm": "Hello| World|'|s|\n|\n|   |1|2|3|4| |中文|ab| éé|,.|x",
    "deepseek-coder": "Hello| World|'|s|\n|\n|   |1|2|3|4| |中文|ab| éé|,.|x",
    "deepseek-v3": "Hello| World|'s|\n\n|   |123|4| |中文|ab| éé|,.|x",
    "hunyuan-dense": "Hello| World|'s|\n\n|   |123|4| |中文|ab| éé|,.|x",
    "falcon": "Hello| World|'|s|\n\n  | |123|4| 中文ab| éé|,.|x",
    "stablelm2": "Hello| World|'s|\n\n|  | |1|2|3|4| 中文ab| éé|,.|x",
    "hunyuan": "Hello| World|'s|\n\n|  | |1|2|3|4| 中文ab| éé|,.|x",
    "viking": "Hello| World's|\n\n  | |1|2|3|4| 中文ab| éé|,.|x",
    "bloom": "Hello| World's|\n\n  | 1234| 中文ab| éé|,.|x",
    "seed-coder": "Hello| World|'s|\n\n|  | |1|2|3|4| 中文ab| éé|,.|x",
    "glm4": "Hello| World|'s|\n\n|  | |123|4| 中文ab| éé|,.|x",
    "chatglm-bpe": "Hello| World|'s|\n\n|  | |123|4| 中文ab| éé|,.|x",
    "kimi-k2": "Hello| World's|\n\n|  | |123|4| |中文|ab| éé|,.|x",
    "minerva-7b": "Hello| World|'s|\n\n   |1|2|3|4| 中文ab| éé|,.|x",
    "trillion": "Hello| World|'s|\n\n  | 1234| 中文ab| éé|,.|x",
    "midm-2.0": "Hello| World|'s|\n\n|  | |123|4| 中文ab| éé|,.|x",
    "superbpe": "Hello World's\n\n   |1|234| 中文ab éé,.x",
    "afmoe": "Hello| World|'s|\n\n|   |1|234| |中文|ab| éé|,.|x",
    "bailingmoe": "Hello| World|'s|\n\n|  | |1|2|3|4| 中文ab| éé|,.|x",
    "exaone-moe": "Hello World|'s|\n\n|  | |1|2|3|4| 中文ab éé|,.|x",
}


@pytest.mark.parametrize("pre", SPLITS)
def test_a_published_rule_splits_text_as_its_models_were_trained(pre: str) -> None:
    whole = SPLITS[pre].replace("|", "")
    rule = pretokenizer_named(pre)
    assert "|".join(whole[start:end] for _, (start, end) in rule.pre_tokenizer().pre_tokenize_str(whole)) == SPLITS[pre]


def test_every_known_rule_keeps_every_byte_of_a_text(byte_level: dict[str, Any]) -> None:
    for pre in NAMES:
        tokenizer = tokenizer_from_gguf(byte_level | {"tokenizer.ggml.pre": pre})
        for text in STRINGS[:50]:
            wanted = unicodedata.normalize("NFC", text) if pretokenizer_named(pre).nfc else text
            assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == wanted, (pre, text)


def test_tokens_in_the_order_of_their_merges_need_no_list_of_merges(byte_level: dict[str, Any]) -> None:
    letters = [token for token in byte_level["tokenizer.ggml.tokens"] if len(token) == 1]
    tokens = (*letters, "ab", "abc", "bc", "abcd")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": (1,) * len(tokens),
    }
    tokenizer = tokenizer_from_gguf(metadata)
    spelt = [tokens[id_] for id_ in tokenizer.encode("abcd bcd", add_special=False)]
    assert spelt == ["abcd", "Ġ", "bc", "d"]
    with pytest.raises(ModelFileError, match="merges"):
        tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "qwen2"})
