"""Peers without the model's file and without its source fetch their layers from other peers."""

import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from real_daemons.cluster import MODEL, Cluster, Daemon

pytestmark = pytest.mark.timeout(300)  # up to five daemons are started one after the other, each with an empty disk

NOWHERE = "http://127.0.0.1:9/simple"
"""The address of a package index that does not exist."""
PROMPT = "Once upon a time, in a small village by the sea,"
HEADER_BYTES, EMBEDDING_BYTES, LAYER_BYTES = 1_785_664, 30_081_024, 2_216_448


def start_empty(cluster: Cluster, *names: str) -> None:
    """Start daemons without models and without a source for them. They share the cached measurements of this machine."""
    for name in names:
        folders = ("--models-dir", str(models_of(cluster, name)), "--hf-cache", str(cluster.root / "hf"))
        cluster.start(name, flags=(*folders, "--pypi-index", NOWHERE))


def models_of(cluster: Cluster, name: str) -> Path:
    return cluster.root / f"models-{name}"


def start_with_file(cluster: Cluster, shared_cache: Path, name: str) -> None:
    """Start a daemon with a model store of links to the cached files, so that it computes their checksums again."""
    models = models_of(cluster, name)
    models.mkdir()
    for path in (shared_cache / "models").glob("*.gguf"):
        (models / path.name).symlink_to(path)
    index = (shared_cache / "models" / "index.json").read_text()
    (models / "index.json").write_text(index.replace(str(shared_cache / "models"), str(models)))
    cluster.start(name, flags=("--models-dir", str(models), "--pypi-index", NOWHERE))


def disk_bytes(cluster: Cluster, name: str) -> int:
    """Return the disk space that a peer's partial files take. The files are sparse, so this is less than their size."""
    files = list(models_of(cluster, name).glob("parts/*/file.gguf"))
    return sum(path.stat().st_blocks * 512 for path in files)


def tensors_on_disk(cluster: Cluster, name: str) -> int:
    """Return the number of tensors that a peer has recorded as complete on its disk, and so would not fetch again."""
    return sum(len(path.read_bytes().splitlines()) for path in models_of(cluster, name).glob("parts/*/have"))


def fetches(daemon: Daemon) -> list[tuple[int, int]]:
    """Return (bytes received, bytes already on disk) of each fetch, from the daemon's log."""
    found = re.findall(r"(\d+) bytes of \S+ came in .*?; (\d+) were here", daemon.log.read_text())
    return [(int(came), int(here)) for came, here in found]


def answer(daemon: Daemon, stages: str) -> str:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "mesh": {"stages": stages}}
    status, document, headers = daemon.post_raw("/v1/completions", body)
    assert status == 200, document
    assert headers["x-meshd-plan"] == stages
    text: str = document["choices"][0]["text"]
    return text


def place_in_background(cluster: Cluster, at: str, stages: str) -> tuple[threading.Thread, list[str]]:
    """Place the model in a thread. Returns: the thread, and a list to which the thread appends the daemon's response at its end."""
    output: list[str] = []
    body = json.dumps({"model": MODEL, "stages": stages, "context": 512}).encode()
    request = urllib.request.Request(cluster[at].api + "/mesh/v1/place", body, {"content-type": "application/json"})

    def ask() -> None:
        with urllib.request.urlopen(request, timeout=120) as stream:
            output.append(stream.read().decode())

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, output


def test_peers_without_file_or_source_fetch_their_layers_and_answer_the_same(cluster: Cluster, shared_cache: Path) -> None:
    start_with_file(cluster, shared_cache, "a")
    start_empty(cluster, "b", "c")
    cluster.see_each_other()
    cluster.place("a", stages="a:0-30", context=512)
    alone = answer(cluster["a"], "a:0-30")
    cluster.place("b", stages="b:0-12,c:12-30", context=512)
    for name in "abc":
        assert answer(cluster[name], "b:0-12,c:12-30") == alone
    both = HEADER_BYTES + EMBEDDING_BYTES
    for name, size in (("b", both + 12 * LAYER_BYTES), ("c", both + 2304 + 18 * LAYER_BYTES)):
        assert sum(came for came, _ in fetches(cluster[name])) == size
        assert size <= disk_bytes(cluster, name) < size + 4_000_000
        assert not list(models_of(cluster, name).glob("*.gguf"))
    cluster["a"].kill()
    for name in "bc":
        assert answer(cluster[name], "b:0-12,c:12-30") == alone
    cluster["b"].kill()
    del cluster.daemons["a"], cluster.daemons["b"]
    start_empty(cluster, "b")
    cluster.see_each_other("b", "c")
    cluster.place("b", stages="b:0-12,c:12-30", context=512)
    assert answer(cluster["b"], "b:0-12,c:12-30") == alone
    assert len(fetches(cluster["b"])) == 2
    cluster.place("c", stages="c:0-30", context=512)
    assert answer(cluster["c"], "c:0-30") == alone
    assert [path.stat().st_size for path in models_of(cluster, "c").glob("*.gguf")] == [98_362_432]


def test_a_peer_killed_while_it_fetches_continues_where_it_stopped(cluster: Cluster, shared_cache: Path) -> None:
    start_with_file(cluster, shared_cache, "a")
    start_empty(cluster, "b")
    cluster.see_each_other()
    thread, _ = place_in_background(cluster, "a", "a:0-1,b:1-30")
    wait_until(lambda: tensors_on_disk(cluster, "b") > 60)
    [shown] = [row["holdings"] for row in cluster["b"].rows("peers") if row["name"] == "b"]
    cluster["b"].kill()
    thread.join()
    assert [(holding["layers"], holding["state"]) for holding in shown] == [("1-30", "loading")]
    assert 0 < shown[0]["progress"] < 0.5
    assert len(fetches(cluster["b"])) == 1, "it was killed too late"
    start_empty(cluster, "b")
    cluster.see_each_other()
    cluster.place("a", stages="a:0-1,b:1-30", context=512)
    _, (came, here) = fetches(cluster["b"])
    assert here >= HEADER_BYTES + 10_000_000
    assert came + here == HEADER_BYTES + EMBEDDING_BYTES + 2304 + 29 * LAYER_BYTES
    cluster.place("a", stages="a:0-30", context=512)
    assert answer(cluster["b"], "a:0-1,b:1-30") == answer(cluster["b"], "a:0-30")


def test_another_peer_replaces_a_source_that_is_killed_while_it_sends(cluster: Cluster, shared_cache: Path) -> None:
    for name in "ab":
        start_with_file(cluster, shared_cache, name)
    start_empty(cluster, "c")
    cluster.see_each_other()
    thread, output = place_in_background(cluster, "a", "a:0-1,c:1-30")
    wait_until(lambda: disk_bytes(cluster, "c") > 20_000_000)
    cluster["b"].kill()
    assert disk_bytes(cluster, "c") < 90_000_000
    thread.join()
    assert "data: [DONE]" in output[0]
    log = cluster["c"].log.read_text()
    assert re.search(r"b \(\w+\) gives no more weights", log)
    assert re.search(r"came in .*from a, \d+ from b|came in .*from b, \d+ from a", log)
    cluster.place("a", stages="a:0-30", context=512)
    assert answer(cluster["a"], "a:0-1,c:1-30") == answer(cluster["a"], "a:0-30")


def test_without_any_source_there_is_soon_one_clear_error(cluster: Cluster, shared_cache: Path) -> None:
    start_with_file(cluster, shared_cache, "a")
    start_empty(cluster, "b")
    cluster.see_each_other()
    thread, output = place_in_background(cluster, "b", "b:0-30")
    wait_until(lambda: disk_bytes(cluster, "b") > 10_000_000)
    began = time.monotonic()
    cluster["a"].kill()
    thread.join()
    assert time.monotonic() - began < 30
    assert output[0].count('"error"') == 1
    assert "no live peer can give" in output[0]
    assert "127.0.0.1:9" in output[0]
    assert [row["holdings"] for row in cluster["b"].rows("peers") if row["name"] == "b"] == [[]]


def wait_until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Poll a condition every 2 ms: often enough for a test to act before a fetch has ended."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            pytest.fail(f"the condition did not hold within {within_s:g} s")
        time.sleep(0.002)
