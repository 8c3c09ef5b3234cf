"""A real daemon as a service manager runs it: readiness, watchdog, reload, its log, and the limits that the unit sets."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cli.support.units import Service, command_of, systemd_unit
from real_daemons.cluster import MODEL, Cluster, Daemon, make_cluster, wait_for

WATCHDOG_S = 1.5


class Manager:
    """The socket of a service manager, and what the daemon has said to it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.lines: list[str] = []

    def hear(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.lines += self._socket.recv(4096).decode().splitlines()
        return self.lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def cluster(tmp_path: Path, shared_cache: Path) -> Iterator[Cluster]:
    (tmp_path / "daemons").mkdir()
    yield from make_cluster(tmp_path / "daemons", shared_cache)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
    yield made
    made.close()


def answer(daemon: Daemon) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "ignore_eos": True}
    text: str = daemon.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return text


def test_a_daemon_says_when_it_is_ready_that_it_lives_and_that_it_stops(cluster: Cluster, manager: Manager) -> None:
    cluster.start("a")
    a = cluster["a"]
    wait_for(lambda: "READY=1" in manager.hear(), "READY=1", a)
    ready = manager.lines.index("READY=1")
    assert "STATUS=measuring this device" in manager.lines[:ready]
    assert manager.lines[ready + 1] == f"STATUS=up as a, API {a.api}, links {a.link}"
    beats = manager.hear().count("WATCHDOG=1")
    wait_for(lambda: manager.hear().count("WATCHDOG=1") >= beats + 3, "three beats", a)
    os.kill(a.process.pid, signal.SIGSTOP)
    quiet = len(manager.hear())
    time.sleep(WATCHDOG_S)
    assert manager.hear()[quiet:] == []  # systemd would restart it now
    os.kill(a.process.pid, signal.SIGCONT)
    wait_for(lambda: len(manager.hear()) > quiet, "beats again", a)
    answer(a)
    words = ["ps", "-o", "pid=", "--ppid", str(a.process.pid)]
    children = subprocess.run(words, capture_output=True, text=True).stdout.split()
    assert children, "the workers of the model's text"
    for pid in children:
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
    manager.hear()
    assert a.stop() == 0
    assert "STOPPING=1" in manager.hear()


def test_a_reload_applies_what_can_change_and_names_what_needs_a_restart(
    cluster: Cluster, manager: Manager, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("max-sessions = 4\n")
    cluster.start("a", flags=("--config", str(config)))
    a = cluster["a"]
    wait_for(lambda: "READY=1" in manager.hear(), "READY=1", a)
    config.write_text('max-sessions = 2\nlog-level = "debug"\nthreads = 2\nexact = true\n')
    os.kill(a.process.pid, signal.SIGHUP)
    wait_for(lambda: manager.hear().count("READY=1") == 2, "the end of the reload", a)
    assert "RELOADING=1" in manager.lines
    text = a.log.read_text()
    # The flags of this daemon stay: --threads here, --copies below.
    assert "settings are read again: max-sessions, log-level changed; exact need a restart" in text
    a.get("/health")
    wait_for(lambda: "level=debug" in a.log.read_text(), "a line at the new level", a)
    command = [sys.executable, "-P", "-m", "meshd", "config", "--reload", "--api", a.api]
    config.write_text("copies = 3\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "valid now: max-sessions, log-level\n")
    config.write_text("max-sessions = many\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "config file" in done.stderr
    os.kill(a.process.pid, signal.SIGHUP)
    wait_for(lambda: "the settings stay as they are" in a.log.read_text(), "the error in the log", a)
    assert answer(a)


def test_a_full_disk_does_not_end_a_daemon_that_logs_to_it(cluster: Cluster, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        log = disk / "logs" / "meshd.log"
        cluster.start("a", flags=("--log-file", str(log), "--log-level", "debug"))
        a = cluster["a"]
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        for _ in range(100):
            a.get("/health")  # each writes a line
        assert answer(a)
        (disk / "filler").unlink()
        assert answer(a)
        wait_for(lambda: " lost=" in log.read_text(errors="replace"), "a line that counts the lost ones", a)
        cluster.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def unit_lines(cluster: Cluster, tmp_path: Path) -> dict[str, str]:
    """Return the settings of the unit of a system service whose folders are those of the daemon `a`."""
    folders = (cluster.root / "a", cluster.shared, tmp_path / "models")
    for folder in folders:
        folder.mkdir(exist_ok=True)
    text = systemd_unit(Service(command=command_of(sys.executable, ()), drain_s=10.0, writable=folders, user="root"))
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_a_daemon_works_where_only_the_folders_of_the_unit_are_writable(cluster: Cluster, tmp_path: Path) -> None:
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("needs root, to mount the system read-only")
    writable = unit_lines(cluster, tmp_path)["ReadWritePaths"].split()
    binds = "".join(f"mount --bind {path} {path}\n" for path in writable)
    read_only = 'for point in $(findmnt -rno TARGET | grep -v -e "^/proc" -e "^/dev" -e "^/sys"); do\n'
    read_only += "".join(f'[ "$point" = {path} ] && continue\n' for path in writable)
    read_only += 'mount -o remount,ro,bind "$point"\ndone\n'
    script = f'set -e\nmount --make-rprivate /\n{binds}{read_only}exec "$@"\n'
    cluster.prefix = ("unshare", "-m", "sh", "-c", script, "sh")
    cluster.start("a")
    touch = ["nsenter", "-t", str(cluster["a"].process.pid), "-m", "touch", str(tmp_path / "not writable")]
    assert "Read-only" in subprocess.run(touch, capture_output=True, text=True).stderr
    assert answer(cluster["a"])
    assert cluster["a"].stop() == 0


def test_a_daemon_makes_no_call_that_the_unit_forbids(cluster: Cluster, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    allowed = set(unit_lines(cluster, tmp_path)["RestrictAddressFamilies"].split())
    trace = tmp_path / "trace"
    calls = "trace=socket,setuid,setgid,capset,personality,sched_setscheduler"
    cluster.prefix = ("strace", "-D", "-f", "-qq", "-e", calls, "-e", "signal=none", "-o", str(trace))
    cluster.start("a", discovery="mdns,static", flags=("--interface", "lo"))
    assert answer(cluster["a"])
    assert cluster["a"].stop() == 0
    text = trace.read_text()
    families = {part.split(",")[0] for part in text.split("socket(")[1:]}
    assert "AF_INET" in families
    assert families - allowed == set()
    for forbidden in ("setuid(", "setgid(", "capset(", "personality(", "sched_setscheduler("):
        assert forbidden not in text
