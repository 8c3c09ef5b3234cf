"""A first hour with one daemon: what is pulled or named runs at once, a plan fetches no weights, everything can be stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fake_api.hub import Hub, serving
from real_daemons.cluster import Cluster, Daemon, make_cluster, wait_for
from tiny.gguf_file import write_gguf
from tiny.hf_folders import write_folder

HEADER_BYTES = 1 << 20
"""Bytes of a file that are fetched to read its header."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a model of 34 MB whose content stalls after 5 MB."""
    content = write_gguf(tmp_path_factory.mktemp("hub") / "m.gguf", layers=40).read_bytes()
    hub = Hub(repositories={"org/slow": {"m.gguf": content}}, stalls={"org/slow": 5_000_000})
    with serving(hub):
        yield hub


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, hub: Hub) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("first hour")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", hub.url)
        for cluster in make_cluster(root, shared_cache):
            cluster.start("a", flags=("--models-dir", str(root / "models"), "--hf-cache", str(root / "hf")))
            yield cluster


def meshd(cluster: Cluster, *words: str, **process: Any) -> "subprocess.Popen[str]":
    """Start a command with the daemon's state folder, in the cluster's folder."""
    environment = {**os.environ, "HOME": str(cluster.root), "MESHD_STATE": str(cluster["a"].state)}
    environment |= {"MESHD_MODELS_DIR": str(cluster.root / "models"), "MESHD_HF_CACHE": str(cluster.root / "hf")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-m", "meshd", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cluster.root, env=environment, text=True, **pipes, **process)


def done(process: "subprocess.Popen[str]") -> str:
    """Wait for a command. Returns: what it printed."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


def test_what_was_just_pulled_is_run_at_once(cluster: Cluster) -> None:
    write_gguf(cluster.root / "pulled.gguf", layers=2)
    assert "is here" in done(meshd(cluster, "pull", "file:pulled.gguf"))
    body = {"model": f"file:{cluster.root}/pulled.gguf", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    status, answer, _ = cluster["a"].post_raw("/v1/chat/completions", body)
    assert status == 200, answer


@pytest.mark.parametrize("spelling", ["file:own.gguf", "file:~/own.gguf", "file:folder"])
def test_a_file_or_folder_is_run_by_any_spelling_of_its_path(cluster: Cluster, spelling: str) -> None:
    if not (cluster.root / "folder").exists():
        write_gguf(cluster.root / "own.gguf", layers=1)
        write_folder(cluster.root / "folder")
    assert done(meshd(cluster, "run", spelling, "Hello", "--max-tokens", "4", "--quiet"))


def test_a_plan_reads_the_header_alone_and_says_what_placing_would_fetch(cluster: Cluster, hub: Hub) -> None:
    plan = json.loads(done(meshd(cluster, "plan", "hf:org/slow", "--json")))
    size = len(hub.repositories["org/slow"]["m.gguf"])
    assert plan["fetch"] == {"bytes": size, "source": "hf:org/slow"}
    assert plan["text"][-1].endswith("are fetched from hf:org/slow first")
    assert hub.sent_bytes <= HEADER_BYTES
    assert plan["plan"] == "a:0-40"


def partial_bytes(cluster: Cluster) -> int:
    return sum(path.stat().st_size for path in (cluster.root / "models" / "partial").rglob("*") if path.is_file())


@pytest.mark.parametrize(("signals", "status"), [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143)])
def test_a_signal_ends_a_pull_and_what_has_come_is_kept(
    cluster: Cluster, hub: Hub, signals: list[signal.Signals], status: int
) -> None:
    process = meshd(cluster, "pull", "hf:org/slow", start_new_session=True)
    wait_for(lambda: hub.stalled and partial_bytes(cluster) >= 5_000_000, "the download to stall", cluster["a"])
    for number in signals:
        process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == status
    assert partial_bytes(cluster) >= 5_000_000
    wait_for(lambda: not hub.stalled, "the connection to the hub to be closed", cluster["a"])


def place_slowly(daemon: Daemon) -> HTTPConnection:
    """Ask the daemon to place the model that stalls, and do not wait for the answer."""
    connection = HTTPConnection(urlsplit(daemon.api).netloc, timeout=60)
    connection.request("POST", "/mesh/v1/place", json.dumps({"model": "hf:org/slow"}), {"content-type": "application/json"})
    return connection


def test_a_client_that_leaves_ends_the_fetch_that_it_asked_for(cluster: Cluster, hub: Hub) -> None:
    connection = place_slowly(cluster["a"])
    wait_for(lambda: hub.stalled, "the download to stall", cluster["a"])
    connection.close()
    wait_for(lambda: not hub.stalled, "the download to end", cluster["a"], within_s=10)


def test_a_daemon_with_a_fetch_under_way_ends_on_sigterm(cluster: Cluster, hub: Hub) -> None:
    connection = place_slowly(cluster["a"])
    wait_for(lambda: hub.stalled, "the download to stall", cluster["a"])
    assert cluster["a"].stop() == 0  # within 15 s, else TimeoutExpired; the drain time is 0
    connection.close()
