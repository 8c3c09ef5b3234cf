"""`meshd invite` and `meshd up --join` with real daemons, which do not use multicast."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshd.protocol.pairing.code import InviteCode
from meshd.state import read_holder
from real_daemons.cluster import Cluster, Daemon, wait_for
from real_daemons.forked import fork


@contextmanager
def inviting(daemon: Daemon) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Run `meshd invite`. Yields: the process, the code, and the address of the invite's listener."""
    command = [sys.executable, "-P", "-m", "meshd", "invite", "--state", str(daemon.state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            code = process.stdout.readline().strip()
            (row,) = daemon.rows("invites")
            assert row["code"] == ""
            yield process, code, row["addresses"][0]
        finally:
            process.kill()


def joining(cluster: Cluster, name: str, code: str, *flags: str) -> Daemon:
    """Start a daemon that joins by a code."""
    state, log = cluster.root / name, cluster.root / f"{name}.log"
    command = [sys.executable, "-P", "-m", "meshd", "up", "--name", name, "--state", str(state), "--api", "127.0.0.1:0"]
    command += ["--link", "127.0.0.1:0", "--threads", "1", "--cache", str(cluster.shared), "--discovery", "static"]
    command += ["--config", os.devnull, "--join", code, *flags]
    daemon = Daemon(name, state, fork(command, log), log)
    cluster.daemons[name] = daemon
    return daemon


def test_a_device_joins_by_a_code_and_the_code_works_once(cluster: Cluster) -> None:
    cluster.start("a")
    with inviting(cluster["a"]) as (process, code, listener):
        b = joining(cluster, "b", f"{code}@{listener}")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "joined: b\n"), err
        wait_for(lambda: cluster.alive(cluster["a"]) == {"a", "b"}, "b to be a member", b)
    assert cluster.key(b) == cluster.key(cluster["a"])
    assert cluster["a"].rows("invites") == []
    assert cluster.key(b) not in cluster["a"].log.read_text() + b.log.read_text()
    assert code not in cluster["a"].log.read_text()
    wait_for(lambda: read_holder(b.state) is not None, "b to be up", b)
    again = joining(cluster, "c", f"{code}@{listener}")
    with inviting(cluster["a"]) as (_, _, _):
        assert again.process.wait(60) == 1
    assert not (again.state / "cluster.key").exists()


def test_the_address_of_the_links_is_enough_to_find_the_invite(cluster: Cluster) -> None:
    cluster.start("a")
    with inviting(cluster["a"]) as (process, code, listener):
        link = f"127.0.0.1:{int(listener.rpartition(':')[2]) - 1}"
        if link != cluster["a"].link:
            pytest.skip("another program has the port after that of the links")
        b = joining(cluster, "b", code, "--peer", link)
        assert process.wait(60) == 0
        wait_for(lambda: cluster.alive(cluster["a"]) == {"a", "b"}, "b to be a member", b)


def test_three_wrong_codes_close_the_invite_and_ctrl_c_does_too(cluster: Cluster) -> None:
    cluster.start("a")
    with inviting(cluster["a"]) as (process, code, listener):
        right = InviteCode.parse(code)
        wrong = InviteCode(right.number, (right.words[0], "lion" if right.words[1] != "lion" else "amber"))
        for name in ("x", "y", "z"):
            stranger = joining(cluster, name, f"{wrong}@{listener}")
            assert stranger.process.wait(60) == 1
            assert "the invite code is wrong" in stranger.log.read_text()
        out, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "three wrong tries" in err
        assert "joined" not in out
    with inviting(cluster["a"]) as (process, _, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        until = time.monotonic() + 30
        while cluster["a"].rows("invites"):
            assert time.monotonic() < until
            time.sleep(0.05)
