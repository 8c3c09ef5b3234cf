"""Parse a `tokenizer.json`, Hugging Face's description of a tokenizer, and check the parts that meshd reads itself."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue

HUGGINGFACE_KEY = "tokenizer.huggingface.json"
"""GGUF's key of a whole `tokenizer.json`. A file with this key may lack the token lists."""
MAX_BYTES = 64 << 20
MAX_ITEMS = 1 << 22
"""Limit for the number of commas and opening brackets, which bounds the memory of the parsed JSON. Gemma's has 1.8 million."""
MAX_ID = 1 << 21
"""Token ids must be less than this, which is eight times the size of Gemma's vocabulary."""
_HINT = "meshd does not support this tokenizer yet; try smollm2:135m"
_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Sequence"})
_Read = TypeVar("_Read")


class AddedToken(msgspec.Struct, frozen=True):
    """An entry of `added_tokens`. `special`: a control token. `lstrip`, `rstrip`: it strips the white space before or after it."""

    id: Annotated[int, Meta(ge=0, lt=MAX_ID)]
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class _Model(msgspec.Struct, frozen=True):
    """The fields of `model` that meshd checks. The tokenizers library parses the rest, above all the vocabulary and the merges."""

    type: str | None = None
    merges: Raw | UnsetType = UNSET
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _Vocabulary(msgspec.Struct, frozen=True):
    vocab: dict[str, int]


class _ModelOf(msgspec.Struct, frozen=True):
    model: _Vocabulary


class _Document(msgspec.Struct, frozen=True):
    model: _Model
    added_tokens: list[AddedToken] | None
    decoder: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


class TokenizerDocument:
    """A parsed `tokenizer.json` of a kind that meshd can use."""

    def __init__(self, text: str, name: str) -> None:
        """`name` is the file's name in error messages. Raises: ModelFileError."""
        self.name = name
        self.text = text
        if len(text) > MAX_BYTES:
            raise self.wrong(f"can't be used: it is larger than {MAX_BYTES} bytes")
        if sum(map(text.count, ",[{")) > MAX_ITEMS:
            raise self.wrong(f"can't be used: its JSON has more than {MAX_ITEMS:,} items")
        document = self._read(_Document)
        self.added = document.added_tokens or []
        self.decoder, self.pre_tokenizer = document.decoder or {}, document.pre_tokenizer or {}
        self._check_model(document.model)
        try:
            self._check_decoder()
            self.kinds(self.pre_tokenizer)
        except (LookupError, TypeError, AttributeError) as error:
            raise self.unusable(f"{type(error).__name__}: {error}") from error

    def text_of(self, id_: int) -> str:
        """Return a token's text; empty for an unknown id. Raises: ModelFileError."""
        added = next((token.content for token in self.added if token.id == id_), None)
        if added is not None:
            return added
        vocabulary = self._read(_ModelOf).model.vocab
        return next((token for token, other in vocabulary.items() if other == id_), "")

    def with_pre_tokenizer(self, pre_tokenizer: dict[str, Any]) -> str:
        """Return the document's JSON with another pre-tokenizer."""
        return msgspec.json.encode(self._read(dict[str, Raw]) | {"pre_tokenizer": pre_tokenizer}).decode()

    @staticmethod
    def steps(parts: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the steps of a decoder or a pre-tokenizer. A `Sequence` is also a step, and comes before its own steps."""
        waiting = [parts] if parts else []
        while waiting:
            step = waiting.pop()
            yield step
            waiting += reversed(step.get("decoders", step.get("pretokenizers", [])))

    def kinds(self, parts: dict[str, Any]) -> set[str]:
        """Return the types of all steps of a decoder or a pre-tokenizer."""
        return {str(step["type"]) for step in self.steps(parts)}

    def wrong(self, why: str, hint: str = "") -> ModelFileError:
        """Make the error for a document that meshd can't use."""
        return ModelFileError(f"{self.name} {why}", hint=hint)

    def unusable(self, why: str) -> ModelFileError:
        """Make the error for a document that can't be parsed."""
        return self.wrong(f"is no usable tokenizer.json: {why}")

    def _read(self, type_: type[_Read]) -> _Read:
        try:
            return msgspec.json.decode(self.text, type=type_)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise self.unusable(str(error)) from error

    def _check_model(self, model: _Model) -> None:
        kind = model.type or ("BPE" if model.merges is not UNSET else None)
        if kind != "BPE":
            raise self.wrong(f"can't be used: its model is of type {kind!r}, and only BPE is known", _HINT)
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            raise self.wrong("can't be used: its model marks the parts of words with a prefix or suffix", _HINT)

    def _check_decoder(self) -> None:
        kinds = self.kinds(self.decoder)
        if unknown := sorted(kinds - _DECODERS):
            raise self.wrong(f"can't be used: its decoder {unknown[0]!r} is not known", _HINT)
        if not kinds & {"ByteLevel", "ByteFallback"}:
            raise self.wrong("can't be used: it is neither byte-level nor SentencePiece with byte fallback", _HINT)
        for step in self.steps(self.decoder):
            if step["type"] == "Replace" and (step["pattern"], step["content"]) != ({"String": "\u2581"}, " "):
                raise self.wrong(f"can't be used: its decoder replaces {step['pattern']!r}", _HINT)
            if step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) != (" ", 1, 0):
                raise self.wrong("can't be used: its decoder strips more than one space", _HINT)


def huggingface_json(metadata: Mapping[str, MetadataValue]) -> TokenizerDocument | None:
    """Parse the `tokenizer.json` in a GGUF file. Returns: None if it has none. Raises: ModelFileError."""
    text = metadata.get(HUGGINGFACE_KEY)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ModelFileError(f"the tokenizer can't be used: {HUGGINGFACE_KEY} is no text")
    return TokenizerDocument(text, HUGGINGFACE_KEY)
