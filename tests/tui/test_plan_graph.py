"""The drawing of a plan."""

from typing import Any

import pytest

from meshd.tui.cluster import ClusterState
from meshd.tui.plan_graph import HopEdge, PlanGraph, StageBox, draw, of_model, of_session

PLAN: dict[str, Any] = {
    "session": "5e" * 16,
    "model": "m" * 32,
    "epoch": 2,
    "context": 512,
    "stages": [
        {"peer": "a", "name": "attic", "layers": "0-16", "predicted_s": 0.010},
        {"peer": "b", "name": "desk", "layers": "16-30", "predicted_s": 0.020},
    ],
    "hops": [
        {"source": "a", "target": "b", "target_name": "desk", "bytes_per_token": 2304, "predicted_s": 0.001},
        {"source": "b", "target": "a", "target_name": "attic", "bytes_per_token": 64, "predicted_s": 0.0005},
    ],
    "predicted_ttft_s": 0.2,
    "measured_ttft_s": 0.25,
    "predicted_tpot_s": 0.0315,
    "measured_tpot_s": 0.050,
}


def work(peer: str, stage: int, busy_s: float, sent: int) -> dict[str, Any]:
    one = {"session": "5e" * 16, "stage": stage, "phase": "decode", "steps": 10, "tokens": 10, "busy_s": busy_s, "sent_bytes": sent}
    return {"type": "work", "peer": peer, "period_s": 1.0, "tokens": 10, "busy_s": busy_s, "stages": [one]}


@pytest.fixture
def cluster() -> ClusterState:
    cluster = ClusterState()
    cluster.apply(work("a", 0, 0.12, 23040), 1.0)
    cluster.apply(work("b", 1, 0.25, 0), 1.0)
    link = {"source": "a", "target": "b", "rtt_s": 0.002, "hop_s": 0.0012, "bandwidth_bytes_s": 2.304e6}
    cluster.apply({"type": "row", "list": "links", "key": "a b", "row": link}, 1.0)
    cluster.apply({"type": "row", "list": "models", "key": "m", "row": {"id": "m" * 32, "name": "smollm2:135m"}}, 1.0)
    return cluster


def test_a_sessions_plan_has_what_was_predicted_beside_what_is_measured(cluster: ClusterState) -> None:
    graph = of_session(cluster, PLAN)
    times = [(stage.predicted_s, stage.measured_s, stage.steps_s) for stage in graph.stages]
    assert times == [(0.010, 0.012, 10.0), (0.020, 0.025, 10.0)]
    there, back = graph.hops
    assert (there.predicted_bytes, there.measured_bytes, there.link_s) == (2304, 2304.0, pytest.approx(0.0022))
    assert back.measured_bytes is None
    assert back.link_s == pytest.approx(0.0012 + 64 / 2.304e6)  # by the opposite direction, which alone was measured
    totals = {name.strip(): (predicted, measured) for name, predicted, measured in graph.totals}
    assert totals["time per token"] == (0.0315, 0.050)
    assert totals["on the stages"] == (pytest.approx(0.030), pytest.approx(0.037))
    assert totals["hops, queues, rest"] == (pytest.approx(0.0015), pytest.approx(0.013))


@pytest.mark.parametrize("width", [10, 52, 200])
def test_the_drawing_has_boxes_and_edges_and_fits(cluster: ClusterState, width: int) -> None:
    text = draw(of_session(cluster, PLAN), width, accent="", strong="").plain
    assert "│ attic  embed + layers 0-16 " in text
    assert "desk  layers 16-30 + head" in text
    assert "2304 B/token, sent 2304 B" in text
    assert "token back to attic" in text
    assert "+59 %" in text
    boxes = {len(line) for line in text.splitlines() if line.startswith(("┌", "└", "│"))}
    assert len(boxes) == 1
    assert max(boxes) == max(44, min(72, width))


def test_what_is_not_known_is_shown_as_such() -> None:
    plan = PLAN | {
        "stages": [stage | {"predicted_s": None} for stage in PLAN["stages"]],
        "hops": [hop | {"bytes_per_token": None, "predicted_s": None} for hop in PLAN["hops"]],
        "measured_ttft_s": None,
        "measured_tpot_s": 0.0,
    }
    text = draw(of_session(ClusterState(), plan), 60, accent="", strong="").plain
    assert "predicted -, measured -" in text
    assert "-/token" in text


def test_names_of_peers_do_not_command_the_terminal() -> None:
    name = "at\x1btic"
    graph = PlanGraph("a\x1b[2Jtitle", [StageBox(name, "0-2", 0.1)], [HopEdge(name, 64, 0.0, local=True)], notes=["\x07"])
    text = draw(graph, 60, accent="", strong="").plain
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "the token stays on this peer" in text


def test_a_models_plan_has_its_memory_and_reasons() -> None:
    document = {
        "model": "smollm2:135m",
        "context": 4096,
        "memory": [{"peer": "a", "used_bytes": 2**30, "capacity_bytes": 2**32}],
        "stages": [{"peer": "a", "name": "attic", "layers": "0-30", "decode_s": 0.01}],
        "hops": [{"source": "a", "target": "a", "target_name": "attic", "bytes_per_token": 64, "decode_s": 0.0}],
        "predicted": {"ttft_s": 0.2, "tpot_s": 0.01},
        "text": ["smollm2:135m: attic:0-30", "binding: nothing"],
    }
    text = draw(of_model(document), 60, accent="", strong="").plain
    assert "memory 1.0 GiB of 4.0 GiB" in text
    assert "embed + layers 0-30 + head" in text
    assert "binding: nothing" in text
    assert "measured -" not in text.split("predicted    measured")[0]
