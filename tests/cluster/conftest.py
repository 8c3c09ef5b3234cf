"""Fixtures: a cluster of real daemons for one test or for a module."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_daemons.cluster import MODEL, Cluster, make_cluster


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """The user's own cache folder, so that runs share the pulled model and the measurement of the device."""
    from meshd.config import Settings

    cache: Path = Settings()["cache"].value
    command = [sys.executable, "-P", "-m", "meshd", "pull", MODEL, "--cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.fail(f"the model {MODEL} cannot be pulled: {done.stderr}")
    return cache


@pytest.fixture
def cluster(tmp_path: Path, shared_cache: Path) -> Iterator[Cluster]:
    """A new cluster without daemons, for one test."""
    yield from make_cluster(tmp_path, shared_cache)
