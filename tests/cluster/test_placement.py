"""Models are placed on devices with enough or too little memory, and removed from them."""

from real_daemons.cluster import MODEL, Cluster, Daemon, wait_for


def test_the_error_for_a_model_that_does_not_fit_has_the_missing_bytes(cluster: Cluster) -> None:
    cluster.start("a", flags=("--memory", "150MiB"))
    status, document, _ = cluster["a"].post_raw("/mesh/v1/plan", {"model": MODEL, "context": 8192})
    assert status == 503
    assert document["error"]["code"] == "does_not_fit"
    assert "MiB" in document["error"]["message"]


def test_two_small_devices_together_hold_a_model_that_fits_on_neither(cluster: Cluster) -> None:
    cluster.start("a", "b", flags=("--memory", "250MiB"))
    cluster.see_each_other()
    alone = {"model": MODEL, "context": 2048, "mesh": {"peers": ["a"]}}
    assert cluster["a"].post_raw("/mesh/v1/plan", alone)[0] == 503
    plan = cluster["a"].post("/mesh/v1/plan", {"model": MODEL, "context": 2048})
    assert len(plan["stages"]) == 2
    cluster.place("a", context=2048)
    wait_until_loaded(cluster["b"])
    answer = cluster["b"].post("/v1/completions", {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4})
    assert answer["usage"]["completion_tokens"] == 4


def test_a_model_can_be_unplaced_and_its_memory_is_freed(cluster: Cluster) -> None:
    cluster.start("a", "b")
    cluster.see_each_other()
    cluster.place("a", stages="a:0-10,b:10-30", context=1024)
    wait_until_loaded(cluster["b"])
    assert cluster["b"].post("/mesh/v1/unplace", {"model": MODEL})["freed_bytes"] > 90_000_000
    for daemon in cluster.daemons.values():
        wait_for(lambda daemon=daemon: not _loaded(daemon), "no model to be served", daemon, within_s=5)


def wait_until_loaded(daemon: Daemon) -> None:
    """Wait until this peer knows of the layers that another one has placed: their adverts arrive a moment later."""
    wait_for(lambda: _loaded(daemon) == [MODEL], "the model to be served", daemon, within_s=5)


def _loaded(daemon: Daemon) -> list[str]:
    """List the models that answer without being loaded first."""
    return [row["id"] for row in daemon.get("/v1/models")["data"] if row["meshd"]["loaded"]]


def test_ready_is_503_until_the_requested_models_are_placed(cluster: Cluster) -> None:
    cluster.start("a", flags=("--model", MODEL))
    status, document, headers = _ready(cluster)
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert "progress" in document
    wait_for(lambda: _ready(cluster)[0] == 200, "the model to be placed", cluster["a"])
    assert cluster["a"].post("/v1/completions", {"model": MODEL, "prompt": "Once", "max_tokens": 2})["choices"]


def _ready(cluster: Cluster) -> tuple[int, dict[str, object], dict[str, str]]:
    return cluster["a"].get_raw("/ready")
