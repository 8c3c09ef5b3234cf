"""`meshd doctor` with real daemons on this machine. `tests/netlab/test_doctor_netlab.py` has those on several hosts."""

import concurrent.futures
import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from real_daemons.cluster import MODEL, Cluster, Daemon

pytestmark = pytest.mark.timeout(240)


def doctor(daemon: Daemon, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    """Returns: the exit status, the results, and standard error."""
    command = [sys.executable, "-P", "-m", "meshd", "doctor", "--json", *words, "--state", str(daemon.state)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.returncode, json.loads(done.stdout)["checks"] if done.stdout else [], done.stderr


def faults(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is not ok, by check. The models are those of the user who runs the tests, in whatever state."""
    return {row["check"]: row for row in results if row["status"] != "ok" and row["check"] != "models"}


@pytest.fixture
def pair(cluster: Cluster) -> Cluster:
    cluster.start("one", "two", flags=("--backend", "onnxruntime"))
    cluster.see_each_other()
    return cluster


def test_two_daemons_check_one_another_and_what_a_model_needs(pair: Cluster) -> None:
    """Daemons of this test listen on loopback only, which is the one thing to remark."""
    status, results, _ = doctor(pair["two"], MODEL)
    assert list(faults(results)) == ["link-port"], faults(results)
    assert faults(results)["link-port"]["status"] == "warning"
    assert status == any(row["status"] == "wrong" for row in results)
    by_id = {row["check"]: row for row in results}
    assert by_id["peer-dials-back"]["subject"] == "one"
    assert by_id["backend"]["subject"] == "onnxruntime"
    assert "fits" in by_id["model"]["found"]


def test_a_model_that_fits_nowhere_is_told_with_what_is_missing(cluster: Cluster) -> None:
    cluster.start("small", flags=("--backend", "onnxruntime", "--memory", "80MiB"))
    status, results, _ = doctor(cluster["small"], MODEL)
    assert status == 1
    found = faults(results)
    assert "of memory are missing" in found["model"]["found"]
    assert "meshd up" in found["model"]["mend"]
    assert found["memory"]["mend"] == "raise --memory"


def test_a_daemon_with_a_copied_folder_says_so_and_is_a_peer_of_its_own(cluster: Cluster) -> None:
    cluster.start("one", flags=("--backend", "onnxruntime"))
    shutil.copytree(cluster["one"].state, cluster.root / "two")
    cluster.start("two", flags=("--backend", "onnxruntime"))
    cluster.see_each_other()
    _, results, _ = doctor(cluster["two"])
    assert "is a copy of another peer's folder" in faults(results)["notice"]["found"]


def test_one_daemon_runs_one_doctor_at_a_time(pair: Cluster) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = list(pool.map(doctor, [pair["one"], pair["one"]]))
    refused = [errors for status, results, errors in both if not results]
    assert len(refused) == 1
    assert "another `meshd doctor` runs on this daemon" in refused[0]
