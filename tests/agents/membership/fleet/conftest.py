"""Identities of one cluster and of another one."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshd.protocol.identity import ClusterKey, Identity, load_identity
from meshd.state import StateFolder

MakeIdentity = Callable[[str], Identity]


@pytest.fixture
def cluster() -> ClusterKey:
    return ClusterKey(bytes(range(32)))


@pytest.fixture
def make_identity(tmp_path: Path, cluster: ClusterKey) -> MakeIdentity:
    """Makes the identity of a peer with this name, in its own state folder."""
    return lambda name: load_identity(StateFolder.open(tmp_path / name), cluster, os.urandom)


@pytest.fixture
def identity(make_identity: MakeIdentity) -> Identity:
    return make_identity("one")


@pytest.fixture
def next_key(cluster: ClusterKey) -> ClusterKey:
    """The cluster's key after a rotation."""
    return ClusterKey(bytes(range(1, 33)), cluster.owner, 1)


@pytest.fixture
def rotated(tmp_path: Path, identity: Identity, next_key: ClusterKey) -> Identity:
    """`identity` after a rotation."""
    return load_identity(StateFolder.open(tmp_path / "one"), next_key, os.urandom)


@pytest.fixture
def stranger(tmp_path: Path) -> Identity:
    """The identity of a peer of another cluster."""
    return load_identity(StateFolder.open(tmp_path / "stranger"), ClusterKey(bytes(32)), os.urandom)
