"""GGUF's `tokenizer.ggml.*` keys, checked as they are read."""

import math
from collections.abc import Mapping

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's `tokenizer.ggml.token_type`."""


class TokenizerKeys:
    """What a GGUF file says of its vocabulary. Every method raises ModelFileError for what it can't be."""

    def __init__(self, metadata: Mapping[str, MetadataValue]) -> None:
        self._metadata = metadata

    def get(self, key: str) -> MetadataValue | None:
        """As the file has it."""
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def strings(self, key: str) -> tuple[str, ...]:
        """At least one."""
        value = self.get(key)
        if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
            raise wrong(key, "it is no list of strings")
        return value  # type: ignore[return-value]  # a GGUF array is of one type

    def tokens(self) -> tuple[str, ...]:
        """Each once."""
        tokens = self.strings("tokens")
        if len(set(tokens)) != len(tokens):
            raise wrong("tokens", "it has a token twice")
        return tokens

    def types(self, count: int) -> tuple[MetadataValue, ...]:
        """One for each of `count` tokens."""
        value = self._metadata.get("tokenizer.ggml.token_type", (NORMAL,) * count)
        if not isinstance(value, tuple) or len(value) != count:
            raise wrong("token_type", f"it is not {count} numbers")
        return value

    def scores(self, count: int) -> tuple[float, ...]:
        """One for each of `count` tokens: the higher, the sooner its parts are merged."""
        value = self.get("scores")
        if not isinstance(value, tuple) or len(value) != count or not isinstance(value[0], float):
            raise wrong("scores", f"it is not {count} numbers")
        if any(math.isnan(score) for score in value):  # type: ignore[arg-type]  # a GGUF array is of one type
            raise wrong("scores", "one of them is NaN")
        return value  # type: ignore[return-value]

    def token(self, key: str, count: int) -> int | None:
        """The id of a token with a role, out of `count`. None: the file names none."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise wrong(key, f"{value!r} is no token of its {count}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise wrong(key, f"{value!r} is neither true nor false")
        return default if value is None else value


def wrong(key: str, why: str) -> ModelFileError:
    """The error for a key that can't be used."""
    return ModelFileError(f"the tokenizer can't be used: tokenizer.ggml.{key}: {why}")
