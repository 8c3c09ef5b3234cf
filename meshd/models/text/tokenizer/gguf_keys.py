"""Read and check GGUF's `tokenizer.ggml.*` keys."""

import math
from collections.abc import Mapping

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of GGUF's `tokenizer.ggml.token_type`."""


class TokenizerKeys:
    """The vocabulary keys of a GGUF file. Every method except `get` raises ModelFileError for an invalid value."""

    def __init__(self, metadata: Mapping[str, MetadataValue]) -> None:
        self._metadata = metadata

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
        """Return the tokens, which must be distinct."""
        tokens = self.strings("tokens")
        if len(set(tokens)) != len(tokens):
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
        if not isinstance(value, tuple) or len(value) != count or not isinstance(value[0], float):
            raise wrong("scores", f"it is not {count} numbers")
        if any(math.isnan(score) for score in value):  # type: ignore[arg-type]  # a GGUF array is of one type
            raise wrong("scores", "one of them is NaN")
        return value  # type: ignore[return-value]

    def token(self, key: str, count: int) -> int | None:
        """Return the token id stored under `key`, which must be less than `count`; None if the file does not have the key."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise wrong(key, f"{value!r} is no token of its {count}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return the boolean stored under `key`; `default` if the file does not have the key."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise wrong(key, f"{value!r} is neither true nor false")
        return default if value is None else value


def wrong(key: str, why: str) -> ModelFileError:
    """Make the error for a key that can't be used."""
    return ModelFileError(f"the tokenizer can't be used: tokenizer.ggml.{key}: {why}")
