"""Parsing tokenizer.json documents, and refusing those that meshd can't use."""

import json
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.document import MAX_ID, TokenizerDocument
from meshd.models.text.tokenizer.files import tokenizer_from_gguf


def test_a_tokenizer_json_with_too_many_items_is_refused() -> None:
    with pytest.raises(ModelFileError, match="more than 4,194,304 items"):
        tokenizer_from_gguf({"tokenizer.huggingface.json": '{"model": [' + "[]," * 2_200_000 + "[]]}"})


def document(**changes: Any) -> TokenizerDocument:
    usable = {
        "added_tokens": [{"id": 5, "content": "<s>", "special": True}],
        "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "Split"}]},
                {"type": "ByteLevel"},
            ],
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 5}, "merges": []},
    }
    return TokenizerDocument(json.dumps(usable | changes), "x.json")


def test_steps_come_in_order_from_every_depth() -> None:
    read = document()
    kinds = [step["type"] for step in read.steps(read.pre_tokenizer)]
    assert kinds == ["Sequence", "Sequence", "Digits", "Split", "ByteLevel"]
    assert read.kinds({}) == set()


def test_a_tokens_text_comes_from_added_tokens_then_from_the_vocabulary() -> None:
    read = document()
    assert [read.text_of(id_) for id_ in (5, 0, 4)] == ["<s>", "a", ""]


def test_replacing_the_pre_tokenizer_changes_nothing_else() -> None:
    read = document()
    changed = json.loads(read.with_pre_tokenizer({"type": "Digits"}))
    assert changed == json.loads(read.text) | {"pre_tokenizer": {"type": "Digits"}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"type": "Unigram"}}, "'Unigram', and only BPE"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "prefix or suffix"),
        ({"decoder": {"type": "WordPiece"}}, "decoder 'WordPiece' is not known"),
        ({"decoder": {"type": "Fuse"}}, "neither byte-level nor SentencePiece"),
        ({"decoder": {}}, "neither byte-level nor SentencePiece"),
        ({"decoder": {"type": "Sequence", "decoders": 3}}, r"no usable tokenizer\.json"),
        ({"pre_tokenizer": {"no": "type"}}, r"no usable tokenizer\.json"),
        ({"added_tokens": [{"id": -1, "content": "a"}]}, r"no usable tokenizer\.json"),
        ({"added_tokens": [{"id": MAX_ID, "content": "a"}]}, r"no usable tokenizer\.json"),
    ],
)
def test_an_unusable_document_is_refused_with_its_name(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelFileError, match=why) as caught:
        document(**changes)
    assert caught.value.message.startswith("x.json ")
