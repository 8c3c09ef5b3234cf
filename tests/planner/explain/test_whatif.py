import pytest

from in_process.clusters import make_peer, make_problem
from meshd.errors import InvalidRequest
from meshd.planner.explain.whatif import parse_what_if, with_what_if
from meshd.planner.network import Network
from meshd.planner.search.solve import solve

EXAMPLE = "+attic ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms"


def test_the_example_in_the_help_is_parsed() -> None:
    here = make_peer("a", decode_gb_s=30.0, attention_gb_s=10.0, overhead_s=20e-6)
    added = parse_what_if(EXAMPLE, [here])
    rates = added.profile.rates
    assert (added.profile.name, added.profile.memory_free_bytes, added.profile.hypothetical) == ("attic", 32 << 30, True)
    assert (rates.decode_bytes_s, rates.attention_bytes_s) == pytest.approx((60e9, 20e9))
    assert rates.layer_overhead_s == pytest.approx(10e-6)
    assert set(added.links) == {(here.id, added.profile.id), (added.profile.id, here.id)}
    link = added.links[here.id, added.profile.id]
    assert (link.rtt_s, link.bandwidth_bytes_s) == pytest.approx((0.0003, 125e6))


def test_defaults_and_extras() -> None:
    added = parse_what_if("+x ram=500MB bw=2.5GiB/s flops=2TFLOPS power=15W", [make_peer("a")])
    assert added.profile.memory_free_bytes == 500_000_000
    assert added.profile.rates.prefill_flops_s == 2e12
    assert added.profile.power_w == 15.0
    assert next(iter(added.links.values())).rtt_s == 0.0005


def test_rates_are_scaled_from_the_most_similar_peer() -> None:
    slow, fast = make_peer("slow", decode_gb_s=2.0, prefill_gflops=10), make_peer("fast", decode_gb_s=50.0, prefill_gflops=900)
    added = parse_what_if("+x ram=1GiB bw=60GB/s", [slow, fast])
    assert added.profile.rates.prefill_flops_s == pytest.approx(900e9 * 60 / 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"begin with \+name"),
        ("attic ram=1GiB bw=1GB/s", r"begin with \+name"),
        ("+ ram=1GiB bw=1GB/s", r"begin with \+name"),
        ("+x ram=1GiB", "needs bw"),
        ("+x", "needs ram and bw"),
        ("+x ram=1GiB bw=1GB/s ram=2GiB", "ram is given twice"),
        ("+x ram=1GiB bw=60", "bw='60' is not a quantity like bw=60GB/s"),
        ("+x ram=1Gbps bw=1GB/s", "not a quantity like ram=32GiB"),
        ("+x ram=-1GiB bw=1GB/s", "not a quantity"),
        ("+x ram=0GiB bw=1GB/s", "more than 0"),
        ("+x ram=1GiB bw=1GB/s colour=red", "'colour=red' is not one of ram="),
        ("+x ram=1GiB bw=1GB/s link", "'link' is not one of"),
        ("+a ram=1GiB bw=1GB/s", "already has a peer called 'a'"),
    ],
)
def test_the_error_names_the_fault(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_what_if(text, [make_peer("a")])
    assert caught.value.param == "what_if"


def test_a_what_if_peer_needs_a_measured_peer() -> None:
    with pytest.raises(InvalidRequest, match="no peer has measured rates"):
        parse_what_if(EXAMPLE, [make_peer("a", decode_gb_s=0.0)])


def test_several_what_if_peers_are_linked_with_one_another() -> None:
    here = make_peer("a")
    profiles, network = with_what_if(["+x ram=1GiB bw=1GB/s", "+y ram=1GiB bw=1GB/s"], [here], Network({}))
    assert [profile.name for profile in profiles] == ["a", "x", "y"]
    assert len(network.stats) == 6


def test_a_faster_what_if_peer_gets_all_layers() -> None:
    problem = make_problem(make_peer("a", decode_gb_s=5.0))
    profiles, network = with_what_if([EXAMPLE], problem.profiles, problem.network)
    better = solve(make_problem(*profiles, network=network))
    assert [stage.peer for stage in better.stages] == ["what-if:attic"]
    assert better.estimate.tpot_s < solve(problem).estimate.tpot_s
