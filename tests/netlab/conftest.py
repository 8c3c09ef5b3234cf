"""Fixtures that make hosts in network namespaces, or skip the test where that is impossible."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from real_daemons.sites import find_netlab

MakeLab = Callable[..., Any]


@pytest.fixture(scope="session")
def netlab() -> Any:
    """The module `netlab`. If it cannot be used, the test is skipped with the reason."""
    found = find_netlab()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def make_lab(netlab: Any) -> Iterator[MakeLab]:
    """Makes labs, which are closed at the end of the test: `lab = make_lab(hosts=3)`."""
    with ExitStack() as labs:
        yield lambda **options: labs.enter_context(netlab.Lab(**options))
