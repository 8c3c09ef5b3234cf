"""`/metrics` of real daemons, with an answer that survives the loss of a peer: no declared metric is empty, and what can be known
from outside is true."""

import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from meshd.agents.admin.metrics import PeerCollector
from meshd.telemetry import Telemetry
from real_daemons.cluster import MODEL, Cluster, Daemon, make_cluster, wait_for

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
PROMPT = "Tell me a story."


def scrape(daemon: Daemon, key: str = "") -> dict[str, Metric]:
    request = urllib.request.Request(daemon.api + "/metrics", headers={"x-api-key": key} if key else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text) if family.name.startswith("meshd_")}


def value(metrics: dict[str, Metric], name: str, /, **labels: str) -> float:
    """Return the sum of the samples of this name that have these labels."""
    family = next(family for family in metrics.values() if any(sample.name == name for sample in family.samples))
    found = [sample.value for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()]
    assert found, f"{name} has no sample with {labels}"
    return sum(found)


def declared() -> dict[str, Metric]:
    """Return all metrics of meshd that a daemon declares, without samples."""
    families = [*Telemetry().registry.collect(), *PeerCollector.describe(object.__new__(PeerCollector))]
    return {family.name: family for family in families if family.name.startswith("meshd_")}


def chat(tokens: int) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    return body | {"max_tokens": tokens, "ignore_eos": True, "mesh": {"stages": "a:0-17,b:17-30"}}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[dict[str, Any]]:
    """The metrics of `a` and `c` after `a` has answered twice, with `b` lost in the second answer, and has refused a stranger."""
    for cluster in make_cluster(tmp_path_factory.mktemp("metrics"), shared_cache):
        cluster.start("a", "b", "c", flags=("--copies", "1"))
        cluster.see_each_other()
        yield used(cluster)


def used(cluster: Cluster) -> dict[str, Any]:
    """Use the cluster. Returns: its metrics, the answers, and the rows of the peers of `a`."""
    a, b = cluster["a"], cluster["b"]
    answers = [a.post("/v1/chat/completions", chat(24))]
    before = scrape(b)
    asking = threading.Thread(target=lambda: answers.append(a.post("/v1/chat/completions", chat(80))))
    asking.start()
    wait_for(lambda: any(row["state"] == "decoding" for row in a.rows("sessions")), "the answer to run", a)
    b.kill()
    asking.join(60)
    assert a.post_raw("/v1/chat/completions", {})[0] == 400
    root = cluster.root / "stranger"
    root.mkdir()
    for stranger in make_cluster(root, cluster.shared):
        stranger.start("x", flags=("--peer", a.link))
        wait_for(lambda: value(scrape(a), "meshd_link_refusals_total") > 0, "the stranger to be refused", a)
    rows = a.rows("peers")
    return {"a": scrape(a), "c": scrape_with_key(cluster["c"]), "b before": before, "answers": answers, "rows": rows}


def scrape_with_key(daemon: Daemon) -> dict[str, Metric]:
    """Scrape with an API key, which counts its requests. The first scrape is counted when it has ended."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "meshd",
        "key",
        "api",
        "add",
        "prometheus",
        "--scope",
        "read",
        "--state",
        str(daemon.state),
    ]
    key = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    scrape(daemon, key)
    return scrape(daemon, key)


def test_every_declared_metric_has_a_sample(scraped: dict[str, Any]) -> None:
    together = {name for peer in ("a", "c") for name, family in scraped[peer].items() if family.samples}
    assert declared().keys() - together == set()


def test_no_metric_is_undeclared_and_names_have_units(scraped: dict[str, Any]) -> None:
    assert scraped["a"].keys() - declared().keys() == set()
    for family in scraped["a"].values():
        ends = {sample.name.endswith("_total") for sample in family.samples}
        assert ends == {family.type == "counter"} or not ends, family.name
    for name, family in declared().items():
        assert family.documentation, name
        assert not re.search(r"_(ms|us|kb|mb)(_|$)", name), f"{name}: Prometheus uses seconds and bytes"


def test_tokens_requests_and_sessions_are_those_of_the_answers(scraped: dict[str, Any]) -> None:
    a, usage = scraped["a"], [answer["usage"] for answer in scraped["answers"]]
    assert value(a, "meshd_tokens_total", kind="prompt") == sum(used["prompt_tokens"] for used in usage)
    assert value(a, "meshd_tokens_total", kind="completion") == 24 + 80
    assert value(a, "meshd_requests_total", route="/v1/chat/completions", outcome="ok") == 2
    assert value(a, "meshd_requests_total", route="/v1/chat/completions") == 3
    assert value(a, "meshd_sessions_ended_total", state="finished") == 2
    assert value(a, "meshd_sessions_active") == 0
    assert value(a, "meshd_ttft_seconds_count") == 1  # only of the answer without a recovery
    assert value(a, "meshd_tpot_seconds_count") == 2
    assert value(a, "meshd_queue_wait_seconds_count") == 2
    assert value(a, "meshd_prediction_ratio_count", what="tpot") == 1


def test_the_recovery_is_counted_with_its_method_and_its_pause(scraped: dict[str, Any]) -> None:
    a = scraped["a"]
    assert value(a, "meshd_recovery_pause_seconds_count") == value(a, "meshd_recovery_pause_seconds_count", cause="loss") == 1
    assert 0 < value(a, "meshd_recovery_pause_seconds_sum") < 60
    assert value(a, "meshd_peer_changes_total", state="dead") == 1
    assert value(a, "meshd_peers", state="dead") == 1
    assert value(a, "meshd_peers", state="alive") == 1


def test_steps_of_a_stage_are_counted_on_the_peer_that_computes_them(scraped: dict[str, Any]) -> None:
    before = scraped["b before"]
    labels = {"model": MODEL, "layers": "17-30"}
    assert (
        value(before, "meshd_stage_seconds_count", phase="decode", **labels) == 23
    )  # the prefill step gives the first of 24 tokens
    assert value(before, "meshd_stage_seconds_count", phase="prefill", **labels) == 1
    assert value(before, "meshd_step_wait_seconds_count", phase="decode") == 23
    assert value(before, "meshd_prediction_ratio_count", what="decode_step") == 23
    assert value(before, "meshd_layers", model=MODEL, state="active") == 13
    assert value(before, "meshd_loads_total", outcome="active") == value(before, "meshd_load_seconds_count") == 1


def test_links_and_their_bytes_are_counted_for_each_peer(scraped: dict[str, Any]) -> None:
    a, ids = scraped["a"], {row["name"]: row["id"] for row in scraped["rows"] if row["id"]}
    assert value(a, "meshd_peer_info", peer=ids["c"], name="c") == 1
    assert value(a, "meshd_hop_seconds_count", peer=ids["c"]) > 0
    assert value(a, "meshd_hop_seconds_count", peer=ids["b"]) > 0
    assert 0 < value(a, "meshd_link_round_trip_seconds", peer=ids["c"]) < 1
    assert value(a, "meshd_link_bandwidth_bytes_per_second", peer=ids["c"]) > 1e3
    activations = 4 * 576 * 24  # one f32 row of 576 for each decode step, at least
    assert value(a, "meshd_sent_payload_bytes_total", kind="activations") > activations
    received = value(scraped["b before"], "meshd_received_payload_bytes_total", kind="activations")
    assert received > activations
    assert value(a, "meshd_link_sent_bytes_total", peer=ids["c"]) > 0


def test_memory_and_journal_are_those_of_the_peers(scraped: dict[str, Any]) -> None:
    a, c = scraped["a"], scraped["c"]
    assert 0 < value(a, "meshd_memory_free_bytes") < value(a, "meshd_memory_total_bytes")
    assert value(a, "meshd_weights_bytes", model=MODEL) > 10e6
    assert value(a, "meshd_kv_blocks") == value(a, "meshd_kv_blocks_free") > 0
    assert value(a, "meshd_memory_reserved_bytes") > value(a, "meshd_weights_bytes", model=MODEL)
    assert value(c, "meshd_journal_sessions", role="deputy") in (0, 1, 2)
    assert value(a, "meshd_agent_failures_total") == 0
    assert value(a, "meshd_events_published_total") > 20
    assert value(a, "meshd_log_lines_total", level="warning") > 0


def test_the_dashboard_asks_only_for_metrics_that_exist(scraped: dict[str, Any]) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    samples = {sample.name for peer in ("a", "c", "b before") for family in scraped[peer].values() for sample in family.samples}
    asked = {name for query in queries for name in re.findall(r"\bmeshd_\w+", query)}
    assert asked - samples == set()
    assert len(asked) > 25
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(titles)
