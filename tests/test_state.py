"""The state folder: private, whole after a crash, held by one daemon."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meshd.errors import StorageError
from meshd.state import Holder, StateFolder, lock_state, read_holder


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder.open(tmp_path / "deep" / "state")


def test_folder_and_files_are_closed_to_others(folder: StateFolder) -> None:
    folder.write("a", b"secret")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "a").stat().st_mode & 0o777 == 0o600
    folder.path.chmod(0o755)
    StateFolder.open(folder.path)
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_a_write_replaces_the_whole_file_and_leaves_nothing_beside_it(folder: StateFolder) -> None:
    folder.write("a", b"a longer text")
    folder.write("a", b"short")
    assert folder.read("a") == b"short"
    assert [path.name for path in folder.path.iterdir()] == ["a"]
    assert folder.read("b") is None


def test_what_can_not_be_written_is_one_clear_error_and_keeps_the_old(folder: StateFolder) -> None:
    (folder.path / "a").mkdir()
    with pytest.raises(StorageError, match="can't be used"):
        folder.write("a", b"x")
    assert [path.name for path in folder.path.iterdir()] == ["a"]
    (folder.path.parent / "file").write_text("")
    with pytest.raises(StorageError):
        StateFolder.open(folder.path.parent / "file" / "state")


def test_a_file_that_others_can_read_is_not_read(folder: StateFolder) -> None:
    path = folder.write("a", b"x")
    path.chmod(0o604)
    with pytest.raises(StorageError, match="0604"):
        folder.read("a")


def test_the_place_changes_with_the_folder_and_with_the_machine(tmp_path: Path) -> None:
    machine = tmp_path / "machine-id"
    machine.write_text("one\n")
    one = StateFolder.open(tmp_path / "s", (machine, tmp_path / "none"))
    place = one.place()
    assert place == StateFolder.open(tmp_path / "s", (machine,)).place()
    assert place != StateFolder.open(tmp_path / "t", (machine,)).place()
    os.rename(tmp_path / "s", tmp_path / "moved")
    assert StateFolder.open(tmp_path / "moved", (machine,)).place() == place
    machine.write_text("two\n")
    assert StateFolder.open(tmp_path / "moved", (machine,)).place() != place


def test_a_second_daemon_is_told_who_holds_the_folder(folder: StateFolder) -> None:
    assert read_holder(folder.path) is None
    with lock_state(folder.path) as lock:
        with pytest.raises(StorageError, match=f"in use by process {os.getpid()}"):
            lock_state(folder.path)
        lock.announce("127.0.0.1:6374")
        assert read_holder(folder.path) == Holder(pid=os.getpid(), api="127.0.0.1:6374")
        with pytest.raises(StorageError, match=r"127\.0\.0\.1:6374"):
            lock_state(folder.path)
    assert read_holder(folder.path) is None
    lock.release()
    lock_state(folder.path).release()


def test_the_lock_file_is_closed_to_others(folder: StateFolder) -> None:
    with lock_state(folder.path):
        assert (folder.path / "lock").stat().st_mode & 0o777 == 0o600


def test_the_lock_is_held_by_the_open_file_not_by_the_process(folder: StateFolder) -> None:
    with lock_state(folder.path):
        with (folder.path / "lock").open("r+b"):
            pass  # a POSIX lock (fcntl F_SETLK) would be lost here
        with pytest.raises(StorageError, match="in use"):
            lock_state(folder.path)


def test_readers_at_once_take_no_dead_daemon_for_a_running_one(folder: StateFolder) -> None:
    (folder.path / "lock").write_bytes(b'{"pid": 1, "api": "x:1"}')  # as a killed daemon leaves it
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(read_holder, [folder.path] * 100)) == {None}


def test_a_folder_that_can_not_be_locked_is_one_clear_error(folder: StateFolder) -> None:
    with pytest.raises(StorageError, match="can't be used: No such file"):
        lock_state(folder.path / "missing")
    (folder.path / "lock").mkdir()
    with pytest.raises(StorageError, match="lock can't be used: Is a directory"):
        lock_state(folder.path)
    assert read_holder(folder.path) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_home_is_one_clear_error(folder: StateFolder) -> None:
    folder.path.chmod(0o500)
    with pytest.raises(StorageError, match="lock can't be used: Permission denied"):
        lock_state(folder.path)


def test_a_killed_daemon_holds_nothing(folder: StateFolder) -> None:
    script = (
        "import pathlib, sys; from meshd.state import lock_state; lock = lock_state(pathlib.Path(sys.argv[1]), 'x:1');"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "held\n"
        assert read_holder(folder.path) == Holder(pid=daemon.pid, api="x:1")
        daemon.kill()
    assert read_holder(folder.path) is None
    lock_state(folder.path).release()
