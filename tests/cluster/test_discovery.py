"""Daemons find one another, and notice when one of them stops."""

import shutil
import subprocess
import sys
import time

from real_daemons.cluster import Cluster, wait_for


def test_a_peer_that_stops_is_soon_gone(cluster: Cluster) -> None:
    cluster.start("a", "b")
    cluster.see_each_other()
    stopped = time.monotonic()
    assert cluster["b"].stop() == 0
    wait_for(lambda: cluster.alive(cluster["a"]) == {"a"}, "b to be gone", cluster["a"], within_s=5)
    assert time.monotonic() - stopped < 5
    row = next(row for row in cluster["a"].rows("peers") if row["name"] == "b")
    assert row["state"] == "left"


def test_a_killed_peer_is_dead_until_it_starts_again(cluster: Cluster) -> None:
    cluster.start("a", "b")
    cluster.see_each_other()
    cluster["b"].kill()
    wait_for(lambda: cluster.alive(cluster["a"]) == {"a"}, "b to be dead", cluster["a"], within_s=5)
    cluster.start("b")
    cluster.see_each_other()


def test_a_daemon_with_another_key_is_refused(cluster: Cluster, tmp_path_factory: object) -> None:
    cluster.start("a")
    stranger = Cluster(cluster.root / "other", cluster.shared)
    stranger.root.mkdir()
    try:
        stranger.start("x", flags=("--peer", cluster["a"].link))
        wait_for(
            lambda: any(row.get("reason") for row in stranger["x"].rows("peers")),
            "a refusal to be shown",
            stranger["x"],
            within_s=15,
        )
        assert cluster.alive(cluster["a"]) == {"a"}
        assert stranger.alive(stranger["x"]) == {"x"}
    finally:
        stranger.close()


def test_a_second_daemon_on_the_same_state_folder_names_the_process_that_uses_it(cluster: Cluster) -> None:
    cluster.start("a")
    daemon = cluster["a"]
    command = [sys.executable, "-P", "-m", "meshd", "up", "--state", str(daemon.state)]
    command += ["--api", "127.0.0.1:0", "--link", "127.0.0.1:0"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert second.returncode == 1
    assert str(daemon.process.pid) in second.stderr
    assert "Traceback" not in second.stderr


def test_a_copied_state_folder_becomes_a_new_peer_with_a_notice(cluster: Cluster) -> None:
    cluster.start("a")
    shutil.copytree(cluster["a"].state, cluster.root / "b")
    cluster.start("b")
    cluster.see_each_other()
    ids = {daemon.get("/mesh/v1/self")["id"] for daemon in cluster.daemons.values()}
    assert len(ids) == 2
    notices = cluster["b"].get("/mesh/v1/self")["notices"]
    assert any("copy" in notice["message"] for notice in notices)
