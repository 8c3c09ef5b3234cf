"""SentencePiece vocabularies, compared with sentencepiece and transformers."""

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from texts.reference_tokenizers import STRINGS, check_ids, check_streams, ids_of, of_gguf
from tiny import vocabularies as tiny_vocabularies


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        (["a", "b" * 600], "more than 512 characters"),
        (["a", *(f"{number:07}" * 60 for number in range(25_000))], "all have more than 8,388,608"),
        (["a" * length + end for end in "abcdefghijklmnopqrstuvwxyz" for length in range(400)], "in more than 1,048,576 ways"),
    ],
    ids=["long", "many", "of one another"],
)
def test_vocabularies_that_would_take_hours_or_gigabytes_are_refused(pieces: list[str], why: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tuple(pieces), "tokenizer.ggml.token_type": (1,) * len(pieces),
        "tokenizer.ggml.scores": tuple(-float(rank) for rank in range(len(pieces))),
    }  # fmt: skip
    with pytest.raises(ModelFileError, match=why):
        tokenizer_from_gguf(metadata)


@pytest.mark.parametrize("spaced", [True, False])
def test_scores_give_the_merges_of_sentencepiece(spaced: bool) -> None:
    metadata, model = tiny_vocabularies.spm(spaced=spaced)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = [tokenizer.encode(text, add_special=False) for text in STRINGS]
    differ = [text for text, some in zip(STRINGS, ids, strict=True) if some != model.encode(text)]
    assert not differ, f"{len(differ)} of {len(STRINGS)}, such as {differ[0]!a}"
    assert [tokenizer.decode(some) for some in ids] == [model.decode(some) for some in ids]
    assert [tokenizer.decode(some).count("\ufffd") for some in ids] == [text.count("\ufffd") for text in STRINGS]
    check_streams(tokenizer, ids)


def test_added_tokens_split_text_as_in_transformers() -> None:
    metadata, _ = tiny_vocabularies.spm(spaced=True, added=("<table>", "\n\n", "<tool_call>", "▁▁"))
    reference = of_gguf(architecture="phi3")(metadata)
    tokenizer = tokenizer_from_gguf(metadata)
    check_ids(tokenizer, ids_of(reference))
