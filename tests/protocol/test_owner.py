"""The owner key and its file."""

import os
from pathlib import Path

import pytest

from meshd.errors import StorageError
from meshd.protocol.owner import OwnerKey, load_owner_key, owner_file, store_owner_key
from meshd.state import StateFolder

FOUNDER = b"f" * 16


def test_a_stored_key_is_loaded_by_its_hash(tmp_path: Path) -> None:
    folder, key = StateFolder.open(tmp_path), OwnerKey.from_seed(os.urandom(32))
    assert load_owner_key(folder, FOUNDER, key.hash) is None
    store_owner_key(folder, FOUNDER, key)
    loaded = load_owner_key(folder, FOUNDER, key.hash)
    assert loaded is not None
    assert loaded.seed == key.seed
    assert load_owner_key(folder, FOUNDER, b"o" * 16) is None, "a key that was replaced is none"
    assert load_owner_key(folder, b"g" * 16, key.hash) is None, "another cluster's key is none"


def test_the_next_owner_key_is_found_if_the_process_ended_before_it_took_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = StateFolder.open(tmp_path)
    old, new = (OwnerKey.from_seed(os.urandom(32)) for _ in range(2))
    store_owner_key(folder, FOUNDER, old)
    store_owner_key(folder, FOUNDER, new, next_one=True)
    for key in (old, new):
        loaded = load_owner_key(folder, FOUNDER, key.hash)
        assert loaded is not None
        assert loaded.seed == key.seed


def test_a_broken_file_is_reported_with_a_hint(tmp_path: Path) -> None:
    folder = StateFolder.open(tmp_path)
    folder.write(owner_file(FOUNDER), b"junk")
    with pytest.raises(StorageError, match="broken") as raised:
        load_owner_key(folder, FOUNDER, b"o" * 16)
    assert "meshd key owner add" in raised.value.hint


def test_the_repr_of_a_key_does_not_contain_it() -> None:
    key = OwnerKey.from_seed(b"s" * 32)
    assert key.seed.hex() not in repr(key)
