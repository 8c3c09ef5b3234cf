"""The files of the cluster's key and of an exclusion."""

import os
from pathlib import Path

import pytest

from meshd.agents.trust.files import EXCLUDED_FILE, StateFiles, load_exclusion
from meshd.clock import SystemClock
from meshd.errors import StorageError
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.identity import load_trust, store_cluster_key
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationChain, sign_rotation
from meshd.state import StateFolder

OWNER = OwnerKey.from_seed(bytes(range(32)))
KEY = ClusterKey(bytes(32), OWNER.hash)
NEXT = ClusterKey(b"n" * 32, OWNER.hash, 7)


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder.open(tmp_path / "state")


def chain() -> RotationChain:
    record = sign_rotation(OWNER, generation=7, authority=NEXT.issuer.public, peers=["a" * 52], at=1)
    return RotationChain(OWNER.hash, (record,))


def test_a_key_is_stored_with_the_rotations_that_led_to_it(folder: StateFolder) -> None:
    identity = StateFiles(folder, SystemClock()).store(NEXT, chain())
    assert identity.key == NEXT
    stored = load_trust(folder)
    assert stored is not None
    assert (stored[0], stored[1].hash) == (NEXT, chain().hash)


def test_a_key_of_another_cluster_is_not_overwritten(folder: StateFolder) -> None:
    store_cluster_key(folder, ClusterKey(os.urandom(32)))
    with pytest.raises(StorageError, match="belongs to another cluster"):
        StateFiles(folder, SystemClock()).store(NEXT, chain())


def test_an_exclusion_counts_until_the_device_has_another_key_whatever_its_generation(folder: StateFolder) -> None:
    assert load_exclusion(folder, KEY) is None
    StateFiles(folder, SystemClock()).store_exclusion(KEY, chain())
    found = load_exclusion(folder, KEY)
    assert found is not None
    assert found.hash == chain().hash
    assert load_exclusion(folder, ClusterKey(b"z" * 32, OWNER.hash, 2)) is None  # joined again after the owner key was changed
    assert load_exclusion(folder, NEXT) is None


def test_a_torn_exclusion_is_none(folder: StateFolder) -> None:
    StateFiles(folder, SystemClock()).store_exclusion(KEY, chain())
    data = folder.read(EXCLUDED_FILE)
    assert data is not None
    for length in (0, 10, 32, 40, len(data) - 1):
        folder.write(EXCLUDED_FILE, data[:length])
        assert load_exclusion(folder, KEY) is None, length
