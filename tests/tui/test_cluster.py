"""The state that the monitor shows, from the events of a daemon."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshd.tui.cluster import KEPT, ClusterState

RECORDED = Path(__file__).parent / "recorded" / "cluster.jsonl"


@pytest.fixture
def recorded() -> ClusterState:
    """The state after all recorded events."""
    cluster = ClusterState()
    for line in RECORDED.read_text().splitlines():
        at_s, event = json.loads(line)
        cluster.apply(event, at_s)
    return cluster


def pull(phase: str, done: int = 0, model: str = "m", peer: str = "p") -> dict[str, Any]:
    return {"type": "pull", "peer": peer, "name": peer, "model": model, "phase": phase, "done_bytes": done, "at": 1.0}


def test_the_recorded_story_ends_with_two_answers_that_went_on_without_the_laptop(recorded: ClusterState) -> None:
    states = {row["name"]: row["state"] for row in recorded.rows["peers"]}
    assert (states["desk"], states["attic"]) == ("alive", "alive")
    assert states["laptop"] in {"dead", "left"}
    assert len(recorded.sessions()) == 2
    assert {event["cause"] for event in recorded.recoveries} == {"loss"}
    for row in recorded.sessions():
        assert recorded.rates.tokens_s(row["id"], recorded.now)
        assert "laptop" not in row["plan"]
    attic = next(row for row in recorded.rows["peers"] if row["name"] == "attic")
    assert max(recorded.histories.of(attic["id"]).tokens_s) > 0
    for plan in recorded.rows["plans"]:
        assert recorded.steps.of(plan["session"], 0, attic["id"]) is not None
        assert recorded.peer(plan["stages"][0]["peer"]) == attic
        assert recorded.model_name(plan["model"]) == "smollm2:135m"
    assert recorded.model_name("f" * 32) == "ffffffff"


def test_pulls_are_kept_by_peer_and_model_and_told_once_for_each_phase() -> None:
    cluster = ClusterState()
    for event in (pull("downloading", 1), pull("downloading", 2), pull("downloading", 3, peer="q"), pull("done", 4)):
        assert "pulls" in cluster.apply(event, 0.0)
    assert [(event["peer"], event["done_bytes"]) for event in cluster.pulls.values()] == [("q", 3), ("p", 4)]
    assert [(event["peer"], event["phase"]) for event in cluster.happenings] == [
        ("p", "downloading"),
        ("q", "downloading"),
        ("p", "done"),
    ]
    for number in range(100):
        cluster.apply(pull("done", model=str(number)), 0.0)
    assert len(cluster.pulls) == 64


def test_only_the_latest_events_are_kept() -> None:
    cluster = ClusterState()
    for number in range(KEPT + 10):
        cluster.apply({"type": "notice", "message": str(number)}, 0.0)
    assert len(cluster.happenings) == KEPT
    assert cluster.happenings[0]["message"] == "10"
    assert [event["message"] for event in cluster.since(cluster.happened - 2)] == [str(KEPT + 8), str(KEPT + 9)]
    assert len(cluster.since(0)) == KEPT


def test_a_new_stream_clears_the_rows_and_keeps_what_happened(recorded: ClusterState) -> None:
    happened = len(recorded.happenings)
    recorded.restart()
    assert recorded.rows["peers"] == []
    assert len(recorded.happenings) == happened
