"""Reads checked values from a model's config.json."""

from collections.abc import Mapping
from typing import Any

from meshd.errors import ModelFileError


class Config:
    """The values of a config.json. Methods that read a value raise ModelFileError if it is missing or invalid."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def given(self, key: str) -> bool:
        """Whether the key exists and is not null."""
        return self._values.get(key) is not None

    def count(self, key: str, default: int | None = None) -> int:
        """Read a positive integer."""
        value = self._values[key] if self.given(key) else default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise ModelFileError(f"config.json can't be used: {key} is {str(value)[:40]}, not a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive number."""
        value = self._values[key] if self.given(key) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ModelFileError(f"config.json can't be used: {key} is {str(value)[:40]}, not a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Read a list of `count` positive numbers."""
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise ModelFileError(f"config.json can't be used: {key} is not a list of {count} numbers")
        return tuple(Config({key: each}).number(key) for each in value)

    def section(self, key: str) -> "Config | None":
        """Read an object. Returns: None if it is missing, null or empty."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ModelFileError(f"config.json can't be used: {key} is not an object")
        return Config(value) if value else None
