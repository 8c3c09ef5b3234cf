"""The text of a `tokenizer.json`, Hugging Face's description of a tokenizer, checked as far as meshd reads it itself."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshd.errors import ModelFileError
from meshd.models.gguf_header import MetadataValue

HUGGINGFACE_KEY = "tokenizer.huggingface.json"
"""GGUF's key for a whole `tokenizer.json`: where a file has it, it says all, and the lists of tokens may be missing."""
MAX_BYTES = 64 << 20
MAX_ID = 1 << 21
"""Four times the largest vocabulary known."""
_HINT = "meshd can't read this model's text yet; try smollm2:135m"
_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Sequence"})


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One of `added_tokens`: `special` ones steer the model; the strips say whether it swallows the white space beside it."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool

    @classmethod
    def of(cls, token: Mapping[str, Any]) -> "AddedToken":
        """Raises: ValueError, LookupError, TypeError."""
        id_, content = token["id"], token["content"]
        if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < MAX_ID or not isinstance(content, str):
            raise ValueError(f"the added token {str(token)[:80]} has no usable id or content")
        return cls(id_, content, *(bool(token.get(flag, False)) for flag in ("special", "lstrip", "rstrip")))


class TokenizerDocument:
    """A parsed `tokenizer.json` of a kind that meshd can use."""

    def __init__(self, text: str, name: str) -> None:
        """`name` is the file's, for errors. Raises: ModelFileError."""
        self.name = name
        self.text = text
        if len(text) > MAX_BYTES:
            raise self.wrong(f"can't be used: it is larger than {MAX_BYTES} bytes")
        try:
            self.content: dict[str, Any] = json.loads(text)
            self.added = [AddedToken.of(token) for token in self.content["added_tokens"] or ()]
            self._check()
        except ModelFileError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self.wrong(f"is no usable tokenizer.json: {type(error).__name__}: {error}") from error

    def text_of(self, id_: int) -> str:
        """A token's text; empty for an id that has none."""
        added = next((token.content for token in self.added if token.id == id_), None)
        if added is not None:
            return added
        vocabulary: Mapping[str, Any] = self.content["model"]["vocab"]
        return next((token for token, other in vocabulary.items() if other == id_), "")

    def kinds(self, role: str) -> set[str]:
        """The types of all steps of the `decoder` or the `pre_tokenizer`."""
        return {str(step["type"]) for step in self.steps(role)}

    def steps(self, role: str, parts: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The steps of the `decoder` or the `pre_tokenizer` (or of `parts`, its like): each sequence, then what it is made of."""
        waiting = [parts or self.content.get(role) or {"type": "Sequence"}]
        while waiting:
            step = waiting.pop()
            yield step
            waiting += reversed(step.get(role.replace("_", "") + "s", []))

    def _check(self) -> None:
        model = self.content["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else "no")
        if kind != "BPE":
            raise self.wrong(f"can't be used: its model is of type {kind!r}, and only BPE is known", _HINT)
        kinds = self.kinds("decoder")
        self.kinds("pre_tokenizer")
        if unknown := sorted(kinds - _DECODERS):
            raise self.wrong(f"can't be used: its decoder {unknown[0]!r} is not known", _HINT)
        if not kinds & {"ByteLevel", "ByteFallback"}:
            raise self.wrong("can't be used: it is neither byte-level nor SentencePiece with byte fallback", _HINT)
        for step in self.steps("decoder"):
            if step["type"] == "Replace" and (step["pattern"], step["content"]) != ({"String": "\u2581"}, " "):
                raise self.wrong(f"can't be used: its decoder replaces {step['pattern']!r}", _HINT)
            if step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) != (" ", 1, 0):
                raise self.wrong("can't be used: its decoder strips more than one space", _HINT)
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise self.wrong("can't be used: its model marks the parts of words with a prefix or suffix", _HINT)

    def wrong(self, why: str, hint: str = "") -> ModelFileError:
        """The error for a document that can't be used."""
        return ModelFileError(f"{self.name} {why}", hint=hint)


def huggingface_json(metadata: Mapping[str, MetadataValue]) -> TokenizerDocument | None:
    """The `tokenizer.json` in a GGUF file, if it has one. Raises: ModelFileError."""
    text = metadata.get(HUGGINGFACE_KEY)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ModelFileError(f"the tokenizer can't be used: {HUGGINGFACE_KEY} is no text")
    return TokenizerDocument(text, HUGGINGFACE_KEY)
