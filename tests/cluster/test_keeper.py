"""Layers that were placed stay placed when peers are lost, and a peer leaves only after its answers have moved or ended."""

import threading
import time
from typing import Any

from real_daemons.cluster import MODEL, Cluster, Daemon, wait_for

SPLIT = "a:0-17,b:17-30"


def holdings(daemon: Daemon, peer: str) -> set[tuple[str, str, bool]]:
    """Return (layers, state, standby) of each holding of a peer, as `daemon` sees them."""
    rows = [row for row in daemon.rows("peers") if row["name"] == peer]
    return {(holding["layers"], holding["state"], holding["standby"]) for row in rows for holding in row["holdings"]}


def all_holdings(daemon: Daemon, *peers: str) -> set[tuple[str, str, str, bool]]:
    return {(peer, *holding) for peer in peers for holding in holdings(daemon, peer)}


def ask(daemon: Daemon, **fields: Any) -> tuple[str, str]:
    """Send a request. Returns: the answer's text and its plan."""
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0} | fields
    status, document, headers = daemon.post_raw("/v1/completions", body)
    assert status == 200, document
    return document["choices"][0]["text"], headers["x-meshd-plan"]


def test_a_lost_stage_is_taken_over_by_its_copy(cluster: Cluster) -> None:
    cluster.start("a", "b", "c", flags=("--copies", "2"))
    cluster.see_each_other()
    cluster.place("a", stages=SPLIT, context=512)
    a = cluster["a"]
    both = {("0-17", "active", True), ("17-30", "active", True)}
    wait_for(lambda: holdings(a, "c") == both, "c to hold copies of both stages", a, within_s=30)
    text, plan = ask(a)
    assert plan == SPLIT, "copies must not be used while the originals are there"
    cluster["b"].kill()
    assert ask(a) == (text, "a:0-17,c:17-30")
    wait_for(lambda: ("17-30", "active", False) in holdings(a, "c"), "the copy to become an original", a, within_s=10)
    assert ask(cluster["c"]) == (text, "a:0-17,c:17-30")
    a.post("/mesh/v1/unplace", {"model": MODEL})
    wait_for(lambda: not all_holdings(a, "a", "c"), "all layers and copies to be unloaded", a, within_s=10)


def test_lost_layers_without_a_copy_are_placed_on_another_peer(cluster: Cluster) -> None:
    cluster.start("a", "b", "c")
    cluster.see_each_other()
    cluster.place("a", stages=SPLIT, context=512)
    cluster["b"].kill()
    a = cluster["a"]
    replaced = {("a", "0-17", "active", False), ("c", "17-30", "active", False)}
    wait_for(lambda: all_holdings(a, "a", "c") == replaced, "the lost layers to be on c", a, within_s=30)
    assert ask(a)[1] == "a:0-17,c:17-30"


def test_a_peer_that_drains_gets_no_new_requests_and_others_take_its_layers(cluster: Cluster) -> None:
    cluster.start("a", "b", "c")
    cluster.see_each_other()
    cluster.place("a", stages=SPLIT, context=512)
    a = cluster["a"]
    done = a.post("/mesh/v1/drain", {"peer": "b", "timeout_s": 5})
    assert done["sessions_left"] == 0
    wait_for(lambda: [row["name"] for row in a.rows("peers") if row["draining"]] == ["b"], "b to be shown as draining", a, 5)
    assert [row["name"] for row in cluster["b"].rows("peers") if row["draining"]] == ["b"]
    wait_for(lambda: ("17-30", "active", False) in holdings(a, "c"), "c to hold the layers of b", a, within_s=30)
    assert ask(a)[1] == "a:0-17,c:17-30"
    a.post("/mesh/v1/drain", {"peer": "b", "undo": True})
    wait_for(lambda: not any(row["draining"] for row in a.rows("peers")), "b to take work again", a, 5)


def test_an_idle_daemon_leaves_at_once(cluster: Cluster) -> None:
    cluster.start("a", "b", flags=("--drain-timeout", "30"))
    cluster.see_each_other()
    cluster.place("a", stages=SPLIT, context=512)
    ask(cluster["a"])
    wait_for(lambda: not cluster["b"].rows("sessions"), "the answer's stage to be closed", cluster["b"], 5)
    began = time.monotonic()
    assert cluster["b"].stop() == 0
    assert time.monotonic() - began < 3
    assert "waiting up to" not in cluster["b"].log.read_text()


def test_a_daemon_waits_for_its_running_answers_and_logs_it(cluster: Cluster) -> None:
    cluster.start("a", flags=("--drain-timeout", "30"))
    a = cluster["a"]
    cluster.place("a", context=512)
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 80, "ignore_eos": True}
    replies: list[int] = []
    asking = threading.Thread(target=lambda: replies.append(a.post_raw("/v1/completions", body)[0]))
    asking.start()
    wait_for(lambda: a.rows("sessions"), "the answer to run", a)
    assert a.stop() == 0
    asking.join(10)
    assert replies == [200]
    log = a.log.read_text()
    assert "waiting up to 30 s for 1 answer and 1 stage to end or move away; a second signal exits at once" in log
    assert "nothing runs here now" in log


def test_a_second_signal_leaves_at_once(cluster: Cluster) -> None:
    cluster.start("a", flags=("--drain-timeout", "60"))
    a = cluster["a"]
    cluster.place("a", context=2048)
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}
    asking = threading.Thread(target=lambda: _ignore_its_end(a, body))
    asking.start()
    wait_for(lambda: a.rows("sessions"), "the answer to run", a)
    a.process.terminate()
    wait_for(lambda: "waiting up to" in a.log.read_text(), "the daemon to wait after the first signal", a)
    assert a.process.poll() is None
    began = time.monotonic()
    a.process.terminate()
    a.process.wait(5)
    assert time.monotonic() - began < 2
    asking.join(10)


def _ignore_its_end(daemon: Daemon, body: dict[str, Any]) -> None:
    try:
        daemon.post_raw("/v1/completions", body)
    except OSError:
        return
