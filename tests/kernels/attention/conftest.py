"""Limits torch to one thread, as everything that computes attention must."""

import pytest

from meshd.kernels.threads import limit_torch_threads


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    limit_torch_threads()
