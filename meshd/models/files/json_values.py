"""A model's config.json, checked as it is read."""

from collections.abc import Mapping
from typing import Any

from meshd.errors import ModelFileError


class Config:
    """Reads numbers of a configuration; each method raises ModelFileError for one that is missing or none."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def given(self, key: str) -> bool:
        """Whether it is there and not null."""
        return self._values.get(key) is not None

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._values[key] if self.given(key) else default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise ModelFileError(f"config.json can't be used: {key} is {str(value)[:40]}, no positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._values[key] if self.given(key) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ModelFileError(f"config.json can't be used: {key} is {str(value)[:40]}, no positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise ModelFileError(f"config.json can't be used: {key} is no list of {count} numbers")
        return tuple(Config({key: each}).number(key) for each in value)

    def section(self, key: str) -> "Config | None":
        """An object within it; None if it is not there."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ModelFileError(f"config.json can't be used: {key} is no object")
        return Config(value) if value else None
