"""The tokenizers of transformers, with which tests compare meshd's, and 10,000 texts that tokenizers often get wrong."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from meshd.models.text.tokenizer.tokenizer import Tokenizer
from texts.odd_strings import odd_strings
from tiny import vocabularies as tiny_vocabularies

STRINGS = odd_strings(10_000)
Make = Callable[[Mapping[str, Any]], PreTrainedTokenizerBase]


def of_class(kind: Callable[..., PreTrainedTokenizerBase], **more: Any) -> Make:
    """Return a function that makes a tokenizer of class `kind`, which serves one family, from the vocabulary in GGUF metadata."""

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
    """Return a function that makes a tokenizer from GGUF metadata by transformers' own conversion.

    `whole_words` (`ignore_merges` in a `tokenizer.json`) is a parameter, since the conversion does not set it.
    """

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


def ids_of(reference: PreTrainedTokenizerBase) -> list[list[int]]:
    return [found.ids for found in reference.backend_tokenizer.encode_batch_fast(STRINGS, add_special_tokens=False)]


def check_ids(tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    differ = [
        (text, found, expected)
        for text, expected in zip(STRINGS, ids, strict=True)
        if (found := tokenizer.encode(text, add_special=False, parse_special=True)) != expected
    ]
    assert not differ, f"{len(differ)} of {len(STRINGS)}, such as {differ[0]!a}"


def check_streams(tokenizer: Tokenizer, ids: list[list[int]]) -> None:
    """Check that the streamed parts of a text join to the decoded text, so that no character is broken between two tokens."""
    for some in ids:
        stream = tokenizer.stream(skip_special=False)
        assert "".join([stream.push(id_) for id_ in some]) == tokenizer.decode(some, skip_special=False)
