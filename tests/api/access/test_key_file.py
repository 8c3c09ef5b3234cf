"""The file of API keys: atomic changes, broken files, full disks."""

import errno
import os
import threading
from pathlib import Path

import pytest

from meshd.api.access.key_file import KeyFile
from meshd.api.access.keys import digest_of
from meshd.api.access.scopes import Scope
from meshd.config import API_KEYS_FILE
from meshd.errors import ConfigError, StorageError
from meshd.state import StateFolder


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(StateFolder.open(tmp_path / "state"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / API_KEYS_FILE


def add(file: KeyFile, name: str, **options: int) -> str:
    return file.add(name, os.urandom, scope=Scope.INFER, created=1, **options)[0]


def test_only_the_hash_of_a_key_is_stored_and_only_the_owner_can_read_it(file: KeyFile, path: Path) -> None:
    text = add(file, "phone", rate=60, concurrency=2, expires=9)
    (key,) = file.load() or ()
    assert key.digest == digest_of(text)
    assert (key.rate, key.concurrency, key.expires) == (60, 2, 9)
    assert path.stat().st_mode & 0o777 == 0o600
    secret = text.rpartition("-")[2]
    assert not any(secret in each.read_text() for each in path.parent.iterdir())


def test_no_file_differs_from_a_file_without_keys(file: KeyFile) -> None:
    assert file.load() is None
    add(file, "phone")
    file.remove("phone")
    assert file.load() == ()


def test_a_name_is_given_once(file: KeyFile) -> None:
    add(file, "phone")
    with pytest.raises(ConfigError, match="already"):
        add(file, "phone")


def test_a_key_is_removed_by_name_prefix_or_the_end_of_the_prefix(file: KeyFile) -> None:
    add(file, "a")
    prefixes = [add(file, name).rpartition("-")[0] for name in ("b", "c")]
    assert file.remove("a")[0].name == "a"
    assert file.remove(prefixes[0])[0].name == "b"
    assert file.remove(prefixes[1].removeprefix("meshd-"))[1] == 0
    with pytest.raises(ConfigError, match="no API key"):
        file.remove("b")


def test_commands_at_the_same_time_lose_no_key(file: KeyFile) -> None:
    threads = [threading.Thread(target=add, args=(file, f"key{number}")) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in file.load() or ()} == {f"key{number}" for number in range(16)}


@pytest.mark.parametrize("cut", [0, 1, 40, -3])
def test_a_torn_file_is_refused_and_not_overwritten(file: KeyFile, path: Path, cut: int) -> None:
    add(file, "phone")
    torn = path.read_bytes()[:cut]
    path.write_bytes(torn)
    with pytest.raises(StorageError, match="is broken"):
        file.load()
    with pytest.raises(StorageError, match="is broken"):
        add(file, "another")
    assert path.read_bytes() == torn


@pytest.mark.parametrize(
    ("old", "new"),
    [('"infer"', '"owner"'), ('"version": 1', '"version": 2'), ('"created": 1', '"created": -1'), ('"phone"', '"ph\\u001bne"')],
)
def test_a_file_with_a_value_out_of_bounds_is_refused(file: KeyFile, path: Path, old: str, new: str) -> None:
    add(file, "phone")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(StorageError, match="is broken"):
        file.load()


def test_a_file_that_others_can_read_is_refused(file: KeyFile, path: Path) -> None:
    add(file, "phone")
    path.chmod(0o644)
    with pytest.raises(StorageError, match="can be read by others"):
        file.load()


def test_on_a_full_disk_the_keys_of_before_stay(file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    add(file, "phone")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("meshd.state.os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            add(file, "another")
    assert [key.name for key in file.load() or ()] == ["phone"]


def test_every_change_changes_the_signature(file: KeyFile) -> None:
    seen = {file.signature()}
    for name in ("aa", "bb", "cc"):
        add(file, name)
        seen.add(file.signature())
        file.remove(name)
        seen.add(file.signature())
    assert len(seen) == 7
    assert None in seen


def test_times_of_last_use_that_cannot_be_read_are_forgotten(file: KeyFile, tmp_path: Path) -> None:
    file.store_last_used({"meshd-abc123": 5})
    assert file.last_used() == {"meshd-abc123": 5}
    (tmp_path / "state" / "api-keys-used.json").write_bytes(b"{")
    assert file.last_used() == {}
