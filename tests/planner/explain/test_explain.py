import json

import pytest

from in_process.clusters import make_holding, make_network, make_peer, make_problem
from meshd.errors import DoesNotFit
from meshd.planner.explain.explain import explain
from meshd.planner.explain.reasons import runner_up
from meshd.planner.explain.whatif import with_what_if
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.search.solve import solve
from meshd.planner.stages import parse_stages
from meshd.planner.units import show_bytes, show_seconds
from meshd.types import Objective

SMALL = 150 << 20


def told(problem: PlanInput) -> dict:
    return explain(problem, solve(problem))


def test_an_account_is_json_and_says_all() -> None:
    account = told(make_problem(make_peer("a", memory=SMALL), make_peer("b", memory=SMALL), make_peer("slow", decode_gb_s=0.1)))
    assert json.loads(json.dumps(account)) == account
    assert account["plan"].startswith("a:0-")
    assert account["predicted"]["tokens_s"] == pytest.approx(1 / account["predicted"]["tpot_s"])
    parts = sum(row["decode_s"] for row in account["stages"]) + sum(row["decode_s"] for row in account["hops"])
    assert parts == pytest.approx(account["predicted"]["tpot_s"])
    for row in account["memory"]:
        purposes = ("layers", "embedding", "head", "kv", "working", "runtime")
        assert sum(row[f"{purpose}_bytes"] for purpose in purposes) == row["used_bytes"]
        assert row["used_bytes"] + row["free_bytes"] == row["capacity_bytes"]


def test_a_split_that_is_slower_than_one_device_is_advised_against() -> None:
    account = told(make_problem(make_peer("a"), make_peer("b"), min_peers=2))
    assert account["split_is_slower"]
    advice = next(line for line in account["text"] if "do not split" in line)
    assert "a alone would do" in advice
    assert [row["constraint"] for row in account["binding"]] == ["min_peers"]


def test_a_split_for_throughput_is_not_called_wrong() -> None:
    account = told(make_problem(make_peer("a"), make_peer("b"), objective=Objective.THROUGHPUT))
    assert not any("do not split" in line for line in account["text"])
    assert any("for one answer at a time splitting does not pay" in line for line in account["text"])


def test_one_device_gives_no_advice() -> None:
    account = told(make_problem(make_peer("a"), make_peer("b")))
    assert not account["split_is_slower"]
    assert "binding: computing layers 0-30 on a takes 100% of a token's time" in account["text"]


def test_memory_that_binds_is_named_with_its_peer() -> None:
    account = told(make_problem(make_peer("big", decode_gb_s=2.0), make_peer("quick", decode_gb_s=100.0, memory=SMALL)))
    binding = account["binding"][0]
    assert (binding["constraint"], "memory of quick" in binding["reason"]) == ("memory", True)
    assert binding["value_if_lifted"] < account["predicted"]["tpot_s"]


def test_other_constraints_bind_too() -> None:
    a, b = make_peer("a", decode_gb_s=1.0, holdings=(make_holding(0, 30),)), make_peer("b", decode_gb_s=50.0)
    routed = told(make_problem(a, b, resident_only=True))
    assert [row["constraint"] for row in routed["binding"]] == ["resident_only"]
    named = told(make_problem(a, b, peers=(a.id,)))
    assert [row["constraint"] for row in named["binding"]] == ["peers"]
    given = told(make_problem(a, b, stages=parse_stages("a:0-30", (a, b), 30)))
    assert [row["constraint"] for row in given["binding"]] == ["stages"]
    assert given["runner_up"] is None
    assert given["left_out"][0]["reason"] == "the request names the stages"


def test_a_network_that_takes_the_time_is_the_binding_part() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    account = told(make_problem(*peers, network=make_network(peers, hop_s=0.5), objective=Objective.MEMORY))
    assert "the hop" in next(line for line in account["text"] if line.startswith("binding"))


def test_the_runner_up_does_without_a_chosen_peer() -> None:
    peers = [make_peer(name, decode_gb_s=rate) for name, rate in (("a", 10.0), ("b", 8.0), ("c", 6.0))]
    account = told(make_problem(*peers))
    assert (account["plan"], account["runner_up"]["plan"]) == ("a:0-30", "b:0-30")
    assert account["runner_up"]["value"] > account["predicted"]["tpot_s"]
    assert "its stages compute" in account["runner_up"]["why"]
    assert any(line.startswith("runner-up: b:0-30: TPOT") for line in account["explanation"])
    alone = make_problem(peers[0])
    assert runner_up(alone, solve(alone)) is None
    assert any("nothing fits without these peers" in line for line in told(alone)["explanation"])


def test_each_peer_left_out_has_its_reason() -> None:
    peers = (
        make_peer("a"),
        make_peer("attic", roles=("storage",)),
        make_peer("new", decode_gb_s=0.0),
        make_peer("tiny", memory=1 << 20),
        make_peer("slow", decode_gb_s=0.1),
    )
    reasons = {row["name"]: row["reason"] for row in told(make_problem(*peers))["left_out"]}
    assert reasons["attic"] == "its role leaves out compute"
    assert reasons["new"] == "its rates are not measured yet"
    assert reasons["tiny"].startswith("it has room for no layer: 1.0 MiB may be used")
    assert reasons["slow"].startswith("it would slow the plan down: TPOT")
    assert "a" not in reasons


def test_unmeasured_links_and_peers_that_are_not_here_are_marked() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    account = told(make_problem(*peers, network=Network({})))
    assert any("(not measured)" in line for line in account["explanation"])
    profiles, network = with_what_if(["+attic ram=32GiB bw=60GB/s"], peers, Network({}))
    account = told(make_problem(*profiles, network=network))
    assert "attic is not here: its rates are scaled from a measured peer's" in account["explanation"]


def test_no_device_alone_says_what_is_missing() -> None:
    lines = told(make_problem(make_peer("a", memory=SMALL), make_peer("b", memory=SMALL)))["explanation"]
    assert any(line.startswith("alone: no device can hold the model; a comes closest and lacks") for line in lines)


def test_many_peers_are_explained_too() -> None:
    peers = [make_peer(f"p{place:02}", decode_gb_s=1.0 + place, memory=SMALL) for place in range(12)]
    account = told(make_problem(*peers))
    assert account["method"] == "heuristic"
    assert len(account["left_out"]) + len(account["stages"]) == 12


def test_what_does_not_fit_says_how_much_is_missing_and_what_would_help() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    with pytest.raises(DoesNotFit, match=r"8000 does not fit: .* MiB of memory are missing on the 2 peers") as caught:
        solve(make_problem(*peers, context=8000))
    error = caught.value
    assert error.hint.startswith("a context of 500 fits")
    roomier = make_peer("a", memory=SMALL + error.missing_bytes), make_peer("b", memory=SMALL + error.missing_bytes)
    assert solve(make_problem(*roomier, context=8000))
    with pytest.raises(DoesNotFit, match="take a smaller model"):
        solve(make_problem(make_peer("a", memory=1 << 20), context=100))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")]
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert show_bytes(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0 us"), (12e-6, "12 us"), (0.0123, "12.3 ms"), (2.5, "2.5 s")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
