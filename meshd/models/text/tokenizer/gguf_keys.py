"""Read and check GGUF's `tokenizer.ggml.*` keys."""

import math
from collections.abc import Mapping, Sequence

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of GGUF's `tokenizer.ggml.token_type`."""


_DEFAULT_IDS: Mapping[object, Mapping[str, int]] = {
    "llama": {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {"bos_token_id": 11, "eos_token_id": 11},
}
"""Kind of tokenizer -> ids of its special tokens in files that don't name them, as in llama.cpp. They must be control tokens."""


class TokenizerKeys:
    """The vocabulary keys of a GGUF file. Every method except `get` raises ModelFileError for a value that can't be used."""

    def __init__(self, metadata: Mapping[str, MetadataValue]) -> None:
        self._metadata = metadata
        self.warnings: list[str] = []
        """What was odd in the values read so far, and what is used instead."""

    def get(self, key: str) -> MetadataValue | None:
        """Return the value stored under `key`, unchecked; None if the file does not have the key."""
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """Return the list of strings stored under `key`, which must not be empty."""
        value = self.get(key)
        if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
            raise wrong(key, "it is no list of strings")
        return value  # type: ignore[return-value]  # a GGUF array is of one type

    def tokens(self) -> tuple[str, ...]:
        """Return the tokens. Of tokens with the same text, at most one may be in use; empty tokens are never matched."""
        tokens = self.strings("tokens")
        if len(set(tokens)) != len(tokens):
            types = self.types(len(tokens))
            used = [token for token, type_ in zip(tokens, types, strict=True) if token and type_ != UNUSED]
            if len(set(used)) != len(used):
                raise wrong("tokens", "it has a token twice")
        return tokens

    def types(self, count: int) -> tuple[MetadataValue, ...]:
        """Return the type of each of `count` tokens; all NORMAL if the file has no types."""
        value = self._metadata.get("tokenizer.ggml.token_type", (NORMAL,) * count)
        if not isinstance(value, tuple) or len(value) != count:
            raise wrong("token_type", f"it is not {count} numbers")
        return value

    def scores(self, count: int) -> tuple[float, ...]:
        """Return the score of each of `count` tokens. BPE first makes the merge whose result has the highest score."""
        value = self.get("scores")
        if (
            not isinstance(value, tuple)
            or len(value) != count
            or isinstance(value[0], bool)
            or not isinstance(value[0], int | float)
        ):
            raise wrong("scores", f"it is not {count} numbers")
        scores = tuple(map(float, value))  # type: ignore[arg-type]  # a GGUF array is of one type
        if any(map(math.isnan, scores)):
            raise wrong("scores", "one of them is NaN")
        return scores

    def special(self, key: str, types: Sequence[MetadataValue]) -> int | None:
        """Return the id of a special token, such as `bos_token_id`.

        `types`: the type of each token. For an id that is missing or out of range, the default of the kind of tokenizer is used.
        Returns: None if there is no such token.
        """
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise wrong(key, f"{value!r} is no token id")
        if value is not None and 0 <= value < len(types):
            return value
        default = _DEFAULT_IDS.get(self.get("model"), {}).get(key)
        if default is not None and (default >= len(types) or (types[default] not in (UNKNOWN, CONTROL) and self.get("token_type"))):
            default = None
        if value is not None or default is not None:
            fault = "is missing" if value is None else f"is {value}, which is no token of the {len(types)}"
            self.warnings.append(
                f"tokenizer.ggml.{key} {fault}: {'no token' if default is None else f'token {default}'} is used for it"
            )
        return default

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean stored under `key`; `default` if the file does not have the key."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise wrong(key, f"{value!r} is neither true nor false")
        return default if value is None else value


def ids_of(tokens: Sequence[str], types: Sequence[MetadataValue]) -> dict[str, int]:
    """Return the id of each token's text. A text that an unused token has too stands for the other one; an empty text for none."""
    unused = {token: id_ for id_, token in enumerate(tokens) if token and types[id_] == UNUSED}
    return unused | {token: id_ for id_, token in enumerate(tokens) if token and types[id_] != UNUSED}


def wrong(key: str, why: str) -> ModelFileError:
    """Make the error for a key that can't be used."""
    return ModelFileError(f"the tokenizer can't be used: tokenizer.ggml.{key}: {why}")
