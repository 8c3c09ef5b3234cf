"""Functions for files on disk: stamps, space, hashes, durable renames and locks."""

import errno
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from meshd.errors import StorageError
from meshd.models.files import disk
from meshd.models.files.disk import (
    CHUNK_BYTES,
    need_space,
    origin_of,
    remove_file,
    replace_durably,
    sha256_of,
    size_of,
    stamp_of,
    storage_error,
    try_lock,
)


def test_a_stamp_changes_with_size_time_and_inode(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12")
    first = stamp_of(path)
    assert first is not None
    assert first.size_bytes == 2
    os.utime(path, ns=(1, 1))
    second = stamp_of(path)
    assert second != first
    (tmp_path / "b").write_bytes(b"34")
    os.utime(tmp_path / "b", ns=(1, 1))
    (tmp_path / "b").replace(path)
    assert stamp_of(path) != second  # same size and time, another inode


def test_folders_and_missing_files_have_no_stamp_and_no_size(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "deeper"):
        assert stamp_of(path) is None
        assert size_of(path) == 0


def test_an_origin_names_each_file_and_its_stamp(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    missing = origin_of(paths)
    paths[0].write_bytes(b"x")
    present = origin_of(paths)
    assert present not in (missing, origin_of(paths[:1]), origin_of(reversed(paths)))
    assert origin_of(paths) == present


def test_removing_returns_the_bytes_freed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"123")
    assert remove_file(path) == 3
    assert remove_file(path) == 0


def test_too_little_space_is_an_error_with_a_margin_for_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk._MARGIN_BYTES + 100))
    need_space(tmp_path, 100)
    with pytest.raises(StorageError, match="too little room: 101 bytes are needed") as caught:
        need_space(tmp_path, 101)
    assert "free 1 bytes" in caught.value.hint


def test_a_file_is_hashed_in_chunks(tmp_path: Path) -> None:
    path, chunks = tmp_path / "a", []
    path.write_bytes(b"x" * (CHUNK_BYTES + 1))
    assert sha256_of(path, chunks.append) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert chunks == [CHUNK_BYTES, 1]
    with pytest.raises(StorageError, match="can't be read: No such file"):
        sha256_of(tmp_path / "none", chunks.append)


def test_a_finished_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    finished, final = tmp_path / "new", tmp_path / "final"
    finished.write_bytes(b"new")
    final.write_bytes(b"old")
    replace_durably(finished, final)
    assert (final.read_bytes(), finished.exists()) == (b"new", False)
    with pytest.raises(FileNotFoundError):
        replace_durably(finished, final)
    assert final.read_bytes() == b"new"


def test_a_lock_is_held_by_one_and_needs_a_folder(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "deep" / "lock"), FileLock(tmp_path / "deep" / "lock")
    assert try_lock(first)
    assert not try_lock(second)
    first.release()
    assert try_lock(second)
    second.release()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="can't be written"):
        try_lock(FileLock(tmp_path / "file" / "lock"))


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some disk space"),
        (errno.EDQUOT, "free some disk space"),
        (errno.EACCES, "make its folder writable"),
        (errno.EROFS, "make its folder writable"),
        (errno.EIO, "check the disk"),
    ],
)
def test_the_hint_of_a_failed_write_fits_its_reason(number: int, hint: str) -> None:
    error = storage_error(Path("/models/index.json"), OSError(number, os.strerror(number)))
    assert str(error).startswith(f"/models/index.json can't be written: {os.strerror(number)}; {hint}")


def test_a_file_that_can_not_be_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing can't be read: No such file or directory; check the path and the disk"):
        sha256_of(tmp_path / "missing", lambda _: None)
