"""Tokenizers read from GGUF metadata and from a tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf, tokenizer_from_json
from meshd.models.text.tokenizer.tokenizer import Tokenizer
from texts.gguf_keys import BASE

GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("golden_smollm2.json").read_text())
IM_START, IM_END = 1, 2


def test_a_tokenizer_json_gives_the_same_ids(smollm2_json: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(smollm2_json)
    again = tokenizer_from_json(path)
    for case in GOLDEN:
        assert again.encode(case["text"], add_special=False) == case["plain"]
        assert again.encode(case["text"], add_special=False, parse_special=True) == case["parsed"]
        assert again.encode(case["text"], add_special=True) == [IM_START, *case["plain"]]
        assert again.decode(case["plain"]) == tokenizer.decode(case["plain"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"added_tokens": []}', '{"added_tokens": [{"content": 1}]}'])
def test_a_missing_or_invalid_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelFileError, match="can't be read"):
        tokenizer_from_json(path)
    path.write_text(content)
    with pytest.raises(ModelFileError, match=r"no usable tokenizer\.json"):
        tokenizer_from_json(path)


def test_tokens_around_a_text_are_added_if_the_file_says_so() -> None:
    tokenizer = tokenizer_from_gguf(BASE)
    assert (tokenizer.bos, tokenizer.eos) == (3, 4)
    assert tokenizer.encode("ab</s>", add_special=True, parse_special=True) == [3, 2, 4]
    assert tokenizer_from_gguf(BASE | {"tokenizer.ggml.add_eos_token": True}).encode("ab", add_special=True) == [3, 2, 4]
    assert tokenizer.encode("ab", add_special=False) == [2]


def test_an_added_token_is_plain_text() -> None:
    tokenizer = tokenizer_from_gguf(BASE)
    assert tokenizer.encode("abc dab", add_special=False) == [2, 5, 2]
    assert tokenizer.decode([2, 5]) == "abc d"
