"""Ten thousand odd strings get the ids that transformers gives them, and none of them streams a broken character.

What transformers takes for its own: its class for a family where it has one, its reading of GGUF metadata elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import (
    AddedToken,
    CohereTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from meshd.models.files.gguf import GgufFile
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.models.text.tokenizer.tokenizer import Tokenizer
from texts.odd_strings import odd_strings
from tiny import vocabularies as tiny_vocabularies

STRINGS = odd_strings(10_000)
Make = Callable[[Mapping[str, Any]], PreTrainedTokenizerBase]


def of_class(kind: Callable[..., PreTrainedTokenizerBase], **more: Any) -> Make:
    """A family's class, with a vocabulary of ours."""

    def make(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        control, added = tiny_vocabularies.CONTROL, tiny_vocabularies.ADDED
        roles = {f"{role}_token": control[0] for role in ("bos", "eos", "unk", "pad", "cls", "sep", "mask")}
        made = kind(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges, **roles, **more)
        made.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        made.add_tokens([AddedToken(token, normalized=False) for token in added])
        return made

    return make


def of_gguf(*, architecture: str = "llama", whole_words: bool = False) -> Make:
    """transformers' own reading of a GGUF file. Of whole words it knows nothing: that is in `tokenizer.json` alone."""

    def make(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        named = {
            "tokenizer_type": "tokenizer.ggml.model",
            "pre_tokenizer_type": "tokenizer.ggml.pre",
            "tokens": "tokenizer.ggml.tokens",
            "token_type": "tokenizer.ggml.token_type",
            "merges": "tokenizer.ggml.merges",
            "scores": "tokenizer.ggml.scores",
        }
        backend, _ = convert_gguf_tokenizer(architecture, {name: metadata[key] for name, key in named.items() if key in metadata})
        if whole_words:
            backend.model.ignore_merges = True
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    return make


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


def check_ids(tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    differ = [
        (text, found, expected)
        for text, expected in zip(STRINGS, ids, strict=True)
        if (found := tokenizer.encode(text, add_special=False, parse_special=True)) != expected
    ]
    assert not differ, f"{len(differ)} of {len(STRINGS)}, such as {differ[0]!a}"


def check_streams(tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    """What is streamed is what is decoded, so that a character is broken only where the bytes are."""
    for some in ids:
        stream = tokenizer.stream(skip_special=False)
        assert "".join([stream.push(id_) for id_ in some]) == tokenizer.decode(some, skip_special=False)


def ids_of(reference: PreTrainedTokenizerBase) -> list[list[int]]:
    return [found.ids for found in reference.backend_tokenizer.encode_batch_fast(STRINGS, add_special_tokens=False)]


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_every_way_to_cut_words_is_that_of_transformers(byte_level: dict[str, Any], pre: str) -> None:
    metadata = byte_level | {"tokenizer.ggml.pre": pre}
    check_ids(tokenizer_from_gguf(metadata), ids_of(BYTE_LEVEL[pre](metadata)))


def test_the_strings_tell_the_ways_to_cut_apart(byte_level: dict[str, Any]) -> None:
    seen: dict[str, str] = {}
    for pre in ("smollm", "default", *BYTE_LEVEL):
        tokenizer = tokenizer_from_gguf(byte_level | {"tokenizer.ggml.pre": pre})
        ids = str([tokenizer.encode(text, add_special=False) for text in STRINGS[:2000]])
        assert seen.setdefault(ids, pre) == pre


def test_smollm2(smollm2: GgufFile, smollm2_json: str) -> None:
    tokenizer = tokenizer_from_gguf(smollm2.metadata)
    reference = PreTrainedTokenizerFast(tokenizer_object=LibraryTokenizer.from_str(smollm2_json))
    ids = list(reference(STRINGS, add_special_tokens=False)["input_ids"])
    check_ids(tokenizer, ids)
    check_streams(tokenizer, ids)
    for some in ids[::10]:
        assert tokenizer.decode(some) == reference.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_gemma3(gemma3: GgufFile) -> None:
    """Held against sentencepiece itself.

    Only where a text spells out SentencePiece's mark of a space do its own ids differ from those of transformers, which are ours:
    there a token that the model's makers added is found in the text as it is.
    """
    tokenizer, model = tokenizer_from_gguf(gemma3.metadata), tiny_vocabularies.model_of(gemma3.metadata)
    plain = [text for text in STRINGS if "▁▁" not in text]
    assert len(plain) > 9900
    ids = [tokenizer.encode(text, add_special=False) for text in plain]
    assert [text for text, some in zip(plain, ids, strict=True) if some != model.encode(text)] == []
    assert [tokenizer.decode(some) for some in ids] == [model.decode(some) for some in ids]
    check_streams(tokenizer, ids)


@pytest.mark.parametrize("spaced", [True, False])
def test_scores_merge_as_sentencepiece_merges(spaced: bool) -> None:
    metadata, model = tiny_vocabularies.spm(spaced=spaced)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = [tokenizer.encode(text, add_special=False) for text in STRINGS]
    differ = [text for text, some in zip(STRINGS, ids, strict=True) if some != model.encode(text)]
    assert not differ, f"{len(differ)} of {len(STRINGS)}, such as {differ[0]!a}"
    assert [tokenizer.decode(some) for some in ids] == [model.decode(some) for some in ids]
    assert [tokenizer.decode(some).count("\ufffd") for some in ids] == [text.count("\ufffd") for text in STRINGS]
    check_streams(tokenizer, ids)


def test_tokens_that_the_makers_added_cut_pieces_as_in_transformers() -> None:
    metadata, _ = tiny_vocabularies.spm(spaced=True, added=("<table>", "\n\n", "<tool_call>", "▁▁"))
    reference = of_gguf(architecture="phi3")(metadata)
    tokenizer = tokenizer_from_gguf(metadata)
    check_ids(tokenizer, ids_of(reference))
