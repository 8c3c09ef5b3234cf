"""The trace of an answer over three real daemons whose monotonic clocks differ by hours: its spans follow one another within the
error that the trace states."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import real_daemons.own_clock
from real_daemons.cluster import MODEL, Cluster, wait_for

OFFSETS = {"a": 0, "b": 7200, "c": 123}
"""Seconds by which each daemon's monotonic clock is ahead."""
Event = dict[str, Any]


def own_clock(ahead: int) -> tuple[str, ...]:
    """Return the beginning of a command that runs its rest with a clock that is `ahead` by so many seconds."""
    return sys.executable, "-P", str(Path(real_daemons.own_clock.__file__)), str(ahead)


def can_set_clocks() -> bool:
    """Whether this user may make time namespaces."""
    return subprocess.run([*own_clock(5), "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[tuple[Cluster, dict[str, Any]]]:
    if not can_set_clocks():
        pytest.skip("needs root and time namespaces, to give each daemon a monotonic clock of its own")
    cluster = Cluster(tmp_path_factory.mktemp("trace"), shared_cache, forked=False)
    try:
        for name, ahead in OFFSETS.items():
            cluster.prefix = own_clock(ahead)
            cluster.start(name)
        cluster.see_each_other()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24, "ignore_eos": True}
        answer = cluster["a"].post("/v1/chat/completions", body | {"mesh": {"stages": "a:0-10,b:10-20,c:20-30"}})
        assert answer["usage"]["completion_tokens"] == 24
        yield cluster, answer
    finally:
        cluster.close()


def trace_of(cluster: Cluster, at: str, answer: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Run `meshd debug trace` against one daemon. Returns: what it wrote."""
    output = tmp_path / "trace.json"
    command = [sys.executable, "-P", "-m", "meshd", "debug", "trace", answer["id"], "-o", str(output), "--api", cluster[at].api]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "ui.perfetto.dev" in done.stdout
    document: dict[str, Any] = json.loads(output.read_text())
    return document


def names(document: dict[str, Any]) -> dict[int, str]:
    events = document["traceEvents"]
    return {event["pid"]: event["args"]["name"].split()[0] for event in events if event["name"] == "process_name"}


@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_spans_follow_one_another_across_peers_within_the_stated_error(
    traced: tuple[Cluster, dict[str, Any]], at: str, tmp_path: Path
) -> None:
    cluster, answer = traced
    document = trace_of(cluster, at, answer, tmp_path)
    clocks = {clock["name"]: clock for clock in document["otherData"]["clocks"]}
    assert set(clocks) == set(OFFSETS)
    assert document["otherData"]["no_trace_of"] == {}
    for name, clock in clocks.items():
        true = OFFSETS[name] - OFFSETS[at]
        assert abs(clock["offset_s"] - true) <= clock["error_s"], f"{name}'s clock is {true} s ahead"
        assert clock["error_s"] < 0.25
    error = {pid: 1e6 * clocks[name]["error_s"] for pid, name in names(document).items()}
    steps: defaultdict[int, dict[str, Event]] = defaultdict(dict)
    for event in document["traceEvents"]:
        if event["ph"] == "X" and event["cat"] != "tokens":
            steps[event["args"]["position"]][event["cat"]] = event
    assert len(steps) == 24  # the prompt's step, which gives the first token, and 23 more
    before: Event | None = None
    for _, step in sorted(steps.items()):
        order = [step[f"{what} stage {stage}"] for stage in range(3) for what in ("waits at", "computes in", "hands over from")]
        order = [before, *order] if before is not None else order
        for one, other in pairwise(order):
            allowed = error[one["pid"]] + error[other["pid"]] if one["pid"] != other["pid"] else 0.01
            assert one["ts"] + one["dur"] <= other["ts"] + allowed, (one, other)
        before = order[-1]


def test_the_trace_has_the_tokens_and_the_story_of_the_answer(traced: tuple[Cluster, dict[str, Any]], tmp_path: Path) -> None:
    cluster, answer = traced
    document = trace_of(cluster, "c", answer, tmp_path)
    tokens = [event for event in document["traceEvents"] if event.get("cat") == "tokens"]
    assert [event["name"] for event in tokens] == [f"token {index}" for index in range(24)]
    assert {names(document)[event["pid"]] for event in tokens} == {"a"}
    story = [event["name"] for event in document["traceEvents"] if event.get("cat") == "story"]
    assert "planned" in story


def test_a_peer_that_is_gone_is_left_out_and_the_others_are_shown(traced: tuple[Cluster, dict[str, Any]], tmp_path: Path) -> None:
    cluster, answer = traced
    cluster["c"].kill()
    wait_for(lambda: "c" not in cluster.alive(cluster["a"]), "a to notice that c is gone", cluster["a"])
    assert set(names(trace_of(cluster, "a", answer, tmp_path)).values()) == {"a", "b"}
