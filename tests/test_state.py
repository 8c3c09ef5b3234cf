"""The state folder: file modes, atomic writes, and the lock of a daemon."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meshd.errors import StorageError
from meshd.state import Holder, MemoryFolder, StateFolder, lock_state, read_holder


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder.open(tmp_path / "deep" / "state")


def test_other_users_have_no_access_to_folder_and_files(folder: StateFolder) -> None:
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


def test_a_write_changes_the_signature_even_with_the_same_bytes(folder: StateFolder) -> None:
    assert folder.signature("a") is None
    folder.write("a", b"text")
    first = folder.signature("a")
    folder.write("a", b"text")
    assert folder.signature("a") not in (first, None)


def test_a_folder_in_memory_reads_what_was_written() -> None:
    folder = MemoryFolder([("a", b"1")])
    folder.write("b", b"2")
    assert [folder.read(name) for name in ("a", "b", "c")] == [b"1", b"2", None]


def test_a_failed_write_is_a_storage_error_and_leaves_no_temporary_file(folder: StateFolder) -> None:
    (folder.path / "a").mkdir()
    with pytest.raises(StorageError, match="can't be used"):
        folder.write("a", b"x")
    assert [path.name for path in folder.path.iterdir()] == ["a"]
    (folder.path.parent / "file").write_text("")
    with pytest.raises(StorageError):
        StateFolder.open(folder.path.parent / "file" / "state")


def test_a_file_that_other_users_can_read_is_refused(folder: StateFolder) -> None:
    path = folder.write("a", b"x")
    path.chmod(0o604)
    with pytest.raises(StorageError, match="0604"):
        folder.read("a")


def test_the_location_id_changes_with_the_folder_and_with_the_machine(tmp_path: Path) -> None:
    machine = tmp_path / "machine-id"
    machine.write_text("one\n")
    one = StateFolder.open(tmp_path / "s", (machine, tmp_path / "none"))
    before = one.location_id()
    assert before == StateFolder.open(tmp_path / "s", (machine,)).location_id()
    assert before != StateFolder.open(tmp_path / "t", (machine,)).location_id()
    os.rename(tmp_path / "s", tmp_path / "moved")
    assert StateFolder.open(tmp_path / "moved", (machine,)).location_id() == before
    machine.write_text("two\n")
    assert StateFolder.open(tmp_path / "moved", (machine,)).location_id() != before


def test_the_error_of_a_second_daemon_names_the_holder_of_the_lock(folder: StateFolder) -> None:
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


def test_other_users_have_no_access_to_the_lock_file(folder: StateFolder) -> None:
    with lock_state(folder.path):
        assert (folder.path / "lock").stat().st_mode & 0o777 == 0o600


def test_the_lock_belongs_to_the_open_file_not_to_the_process(folder: StateFolder) -> None:
    with lock_state(folder.path):
        with (folder.path / "lock").open("r+b"):
            pass  # a POSIX lock (fcntl F_SETLK) would be lost here
        with pytest.raises(StorageError, match="in use"):
            lock_state(folder.path)


def test_simultaneous_readers_do_not_report_a_dead_daemon(folder: StateFolder) -> None:
    (folder.path / "lock").write_bytes(b'{"pid": 1, "api": "x:1"}')  # as a killed daemon leaves it
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(read_holder, [folder.path] * 100)) == {None}


def test_a_folder_that_can_not_be_locked_is_a_storage_error(folder: StateFolder) -> None:
    with pytest.raises(StorageError, match="can't be used: No such file"):
        lock_state(folder.path / "missing")
    (folder.path / "lock").mkdir()
    with pytest.raises(StorageError, match="lock can't be used: Is a directory"):
        lock_state(folder.path)
    assert read_holder(folder.path) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_storage_error(folder: StateFolder) -> None:
    folder.path.chmod(0o500)
    with pytest.raises(StorageError, match="lock can't be used: Permission denied"):
        lock_state(folder.path)


def test_a_lock_file_that_cannot_be_written_is_a_storage_error(folder: StateFolder) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from meshd.errors import StorageError\n"
        "from meshd.state import lock_state\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # as on a full disk, no file can grow\n"
        "try: lock_state(Path(sys.argv[1]))\n"
        "except StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder.path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{folder.path / 'lock'} can't be used: File too large; free space")
    with lock_state(folder.path):
        pass


def test_a_link_in_place_of_the_lock_file_is_not_followed(folder: StateFolder, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    (folder.path / "lock").symlink_to(precious)
    with pytest.raises(StorageError, match="can't be used"):
        lock_state(folder.path)
    assert precious.read_text() == "data"


def test_the_lock_of_a_killed_daemon_is_free(folder: StateFolder) -> None:
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
