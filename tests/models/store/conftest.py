"""A store that pulls from the package index of the test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshd.models.store.store import Store


@pytest.fixture
def store(tmp_path: Path, package_index: Any, instant_clock: Any) -> Store:
    return Store(tmp_path / "models", tmp_path / "hf", index_url=package_index.url, clock=instant_clock)


@pytest.fixture
def leftovers(tmp_path: Path) -> Callable[[], list[str]]:
    """Lists the files that pulls have left, without their locks."""

    def listed() -> list[str]:
        found = (tmp_path / "models" / "partial").rglob("*")
        return sorted(path.name for path in found if path.is_file() and path.name != "lock")

    return listed
