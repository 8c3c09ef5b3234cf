import json

import pytest

from in_process.clusters import make_network, make_peer, make_problem
from meshd.planner.explain.explain import explain
from meshd.planner.explain.whatif import with_what_if
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.search.solve import solve
from meshd.planner.stages import parse_stages
from meshd.types import Objective

SMALL = 150 << 20


def explained(problem: PlanInput) -> dict:
    return explain(problem, solve(problem))


def test_an_explanation_is_json_and_its_figures_add_up() -> None:
    explanation = explained(
        make_problem(make_peer("a", memory=SMALL), make_peer("b", memory=SMALL), make_peer("slow", decode_gb_s=0.1))
    )
    assert json.loads(json.dumps(explanation)) == explanation
    assert explanation["plan"].startswith("a:0-")
    assert explanation["predicted"]["tokens_s"] == pytest.approx(1 / explanation["predicted"]["tpot_s"])
    parts = sum(row["decode_s"] for row in explanation["stages"]) + sum(row["decode_s"] for row in explanation["hops"])
    assert parts == pytest.approx(explanation["predicted"]["tpot_s"])
    for row in explanation["memory"]:
        purposes = ("layers", "embedding", "head", "kv", "working", "runtime")
        assert sum(row[f"{purpose}_bytes"] for purpose in purposes) == row["used_bytes"]
        assert row["used_bytes"] + row["free_bytes"] == row["capacity_bytes"]


def test_a_split_that_is_slower_than_one_device_is_advised_against() -> None:
    explanation = explained(make_problem(make_peer("a"), make_peer("b"), min_peers=2))
    assert explanation["split_is_slower"]
    advice = next(line for line in explanation["text"] if "do not split" in line)
    assert "a alone would do" in advice
    assert [row["constraint"] for row in explanation["binding"]] == ["min_peers"]


def test_a_split_for_throughput_is_not_advised_against() -> None:
    explanation = explained(make_problem(make_peer("a"), make_peer("b"), objective=Objective.THROUGHPUT))
    assert not any("do not split" in line for line in explanation["text"])
    assert any("for one answer at a time splitting does not pay" in line for line in explanation["text"])


def test_one_device_gives_no_advice() -> None:
    explanation = explained(make_problem(make_peer("a"), make_peer("b")))
    assert not explanation["split_is_slower"]
    assert "binding: computing layers 0-30 on a takes 100% of a token's time" in explanation["text"]


def test_given_stages_have_no_runner_up() -> None:
    a, b = make_peer("a"), make_peer("b")
    explanation = explained(make_problem(a, b, stages=parse_stages("a:0-30", (a, b), 30)))
    assert explanation["runner_up"] is None
    assert explanation["left_out"][0]["reason"] == "the request names the stages"


def test_the_slowest_hop_binds_if_the_network_takes_most_of_the_time() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    explanation = explained(make_problem(*peers, network=make_network(peers, hop_s=0.5), objective=Objective.MEMORY))
    assert "the hop" in next(line for line in explanation["text"] if line.startswith("binding"))


def test_the_runner_up_lacks_a_chosen_peer() -> None:
    peers = [make_peer(name, decode_gb_s=rate) for name, rate in (("a", 10.0), ("b", 8.0), ("c", 6.0))]
    explanation = explained(make_problem(*peers))
    assert (explanation["plan"], explanation["runner_up"]["plan"]) == ("a:0-30", "b:0-30")
    assert explanation["runner_up"]["value"] > explanation["predicted"]["tpot_s"]
    assert "its stages compute" in explanation["runner_up"]["why"]
    assert any(line.startswith("runner-up: b:0-30: TPOT") for line in explanation["explanation"])
    alone = explained(make_problem(peers[0]))
    assert any("no plan fits without these peers" in line for line in alone["explanation"])


def test_unmeasured_links_and_hypothetical_peers_are_marked() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    explanation = explained(make_problem(*peers, network=Network({})))
    assert any("(not measured)" in line for line in explanation["explanation"])
    profiles, network = with_what_if(["+attic ram=32GiB bw=60GB/s"], peers, Network({}))
    explanation = explained(make_problem(*profiles, network=network))
    assert "attic is hypothetical: its rates are scaled from a measured peer's" in explanation["explanation"]


def test_a_model_too_large_for_one_device_has_the_missing_bytes_explained() -> None:
    lines = explained(make_problem(make_peer("a", memory=SMALL), make_peer("b", memory=SMALL)))["explanation"]
    assert any(line.startswith("alone: no device can hold the model; a comes closest and lacks") for line in lines)


def test_many_peers_are_explained_too() -> None:
    peers = [make_peer(f"p{place:02}", decode_gb_s=1.0 + place, memory=SMALL) for place in range(12)]
    explanation = explained(make_problem(*peers))
    assert explanation["method"] == "heuristic"
    assert len(explanation["left_out"]) + len(explanation["stages"]) == 12
