"""Plans on one numerics id, on one that promises nothing, and on several."""

import msgspec
import pytest

from in_process.clusters import OTHER, PROMISED, UNPROMISED, make_advert, make_card, make_holding, make_peer, make_problem
from meshd.errors import DoesNotFit, Unavailable
from meshd.numerics import UNKNOWN, NumericsId
from meshd.planner.explain.explain import explain
from meshd.planner.explain.whatif import parse_what_if
from meshd.planner.profile import PeerProfile, profiles_from_adverts
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.numerics import MIXING_GAIN, Exactness, exactness, in_use, limits_within
from meshd.planner.search.plan import build_plan
from meshd.planner.search.repair import repair, repair_within
from meshd.planner.search.solve import solve
from meshd.types import LayerRange, PlanId

TIGHT = 180 << 20
"""Memory for most of the model with its KV, but not for all of it: a plan takes two such peers."""


def peer(name: str, numerics: NumericsId, *, gb_s: float = 10.0, memory: int = 4 << 30, **fields: object) -> PeerProfile:
    return make_peer(name, numerics=numerics, decode_gb_s=gb_s, memory=memory, **fields)  # type: ignore[arg-type]


def chosen(*peers: PeerProfile, **fields: object) -> str:
    solution = solve(make_problem(*peers, **fields))  # type: ignore[arg-type]
    return ",".join(peer.removesuffix("-id") for peer in solution.peers)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((PROMISED,), Exactness.PROMISED),
        ((PROMISED, PROMISED), Exactness.PROMISED),
        ((UNPROMISED, UNPROMISED), Exactness.ONE),
        ((UNKNOWN,), Exactness.ONE),
        ((PROMISED, OTHER), Exactness.MIXED),
        ((PROMISED, UNKNOWN), Exactness.MIXED),
    ],
)
def test_what_a_plan_promises(ids: tuple[NumericsId, ...], expected: Exactness) -> None:
    assert exactness(ids) is expected


def test_two_peers_of_one_id_are_taken_before_faster_mixed_ones() -> None:
    a, b = peer("a", PROMISED, memory=TIGHT), peer("b", PROMISED, memory=TIGHT)
    assert chosen(a, b, peer("c", OTHER, gb_s=12.0, memory=TIGHT)) == "a,b"
    assert "c" in chosen(a, b, peer("c", OTHER, gb_s=100.0, memory=TIGHT))


def test_a_peer_that_makes_no_promise_is_taken_alone_only_if_it_is_clearly_faster() -> None:
    assert chosen(peer("a", PROMISED), peer("t", UNPROMISED, gb_s=11.0)) == "a"
    assert chosen(peer("a", PROMISED), peer("t", UNPROMISED, gb_s=40.0)) == "t"


def test_the_gain_that_decides_is_the_stated_one() -> None:
    base = solve(make_problem(peer("a", PROMISED, attention_gb_s=1e6, overhead_s=0.0, step_overhead_s=0.0))).value
    for share, winner in ((1 - MIXING_GAIN + 0.01, "a"), (1 - MIXING_GAIN - 0.01, "t")):
        fast = peer("t", UNPROMISED, gb_s=10.0 / share, attention_gb_s=1e6, overhead_s=0.0, step_overhead_s=0.0)
        assert solve(make_problem(fast)).value == pytest.approx(share * base, rel=1e-3)
        assert chosen(peer("a", PROMISED, attention_gb_s=1e6, overhead_s=0.0, step_overhead_s=0.0), fast) == winner


def test_where_nothing_else_fits_a_plan_is_mixed_and_says_so() -> None:
    problem = make_problem(peer("a", PROMISED, memory=TIGHT), peer("b", UNPROMISED, memory=TIGHT))
    solution = solve(problem)
    assert set(solution.numerics) == {PROMISED, UNPROMISED}
    assert build_plan(PlanId("p"), problem, solution).numerics == solution.numerics
    explained = explain(problem, solution)
    assert explained["numerics"]["mixed"]
    assert explained["numerics"]["ids"] == list(solution.numerics)
    [line] = [line for line in explained["text"] if line.startswith("mixed numerics")]
    assert f"a {PROMISED}" in line
    assert "a near-tie may be decided otherwise" in line
    assert "no plan on one numerics fits" in line


def test_a_plan_on_one_promised_id_says_what_mixing_would_gain() -> None:
    peers = (
        peer("a", PROMISED, memory=TIGHT),
        peer("b", PROMISED, memory=TIGHT),
        peer("c", OTHER, gb_s=12.0, memory=TIGHT),
    )
    problem = make_problem(*peers)
    explained = explain(problem, solve(problem))
    assert explained["numerics"]["promised"]
    assert "less than 25% better" in explained["numerics"]["why"]
    assert not any("numerics" in line for line in explained["text"])
    assert any(line.startswith(f"numerics: {PROMISED}: the same tokens") for line in explained["explanation"])
    [left_out] = explained["left_out"]
    assert OTHER in left_out["reason"]


def test_an_id_without_a_promise_is_named() -> None:
    problem = make_problem(peer("t", UNPROMISED))
    explained = explain(problem, solve(problem))
    assert not explained["numerics"]["promised"]
    assert any("no promise" in line for line in explained["text"])


def test_time_limits_that_only_a_mixed_plan_keeps_are_kept_by_it() -> None:
    peers = (
        peer("a", PROMISED, memory=TIGHT),
        peer("b", PROMISED, memory=TIGHT),
        peer("c", OTHER, gb_s=12.0, memory=TIGHT),
    )
    one, mixed = (solve(make_problem(*some)) for some in (peers[:2], (peers[0], peers[2])))
    limit = (one.estimate.tpot_s + mixed.estimate.tpot_s) / 2
    assert mixed.estimate.tpot_s < limit < one.estimate.tpot_s
    assert "c" in chosen(*peers, max_tpot_s=limit)
    with pytest.raises(Unavailable):
        solve(make_problem(*peers, max_tpot_s=mixed.estimate.tpot_s / 10))


def test_named_stages_are_taken_as_they_are() -> None:
    peers = (peer("a", PROMISED), peer("b", OTHER))
    stages = solve(make_problem(*peers, min_peers=2)).stages
    given = solve(make_problem(*peers, stages=stages))
    assert exactness(given.numerics) is Exactness.MIXED
    assert "the request names the stages" in explain(make_problem(*peers, stages=stages), given)["numerics"]["why"]


def test_limits_are_expressed_in_the_places_of_a_group() -> None:
    limits = SearchLimits(require=frozenset({3}), forbid=frozenset({1, 3}))
    assert limits_within(limits, (1, 3)) == SearchLimits(require=frozenset({1}), forbid=frozenset({0, 1}))
    assert limits_within(limits, (2, 3)) == SearchLimits(require=frozenset({1}))
    assert limits_within(limits, (0, 1)) is None


def test_missing_layers_go_to_peers_with_the_numerics_that_serve_the_model() -> None:
    serving = peer("a", PROMISED, holdings=(make_holding(0, 20),), memory=0)
    fast, slow = peer("b", OTHER, gb_s=100.0), peer("c", PROMISED, gb_s=5.0)
    missing = (LayerRange(20, 30),)
    problem = make_problem(serving, fast, slow)
    assert in_use(problem.profiles) == {PROMISED}
    assert repair(problem, missing, kv_tokens=512)[0].peer == fast.id
    stages, tokens = repair_within(problem, missing, kv_tokens=1024, least_tokens=512)
    assert ([stage.peer for stage in stages], tokens) == ([slow.id], 1024)
    tight = msgspec.structs.replace(slow, memory_free_bytes=10 << 20)
    problem = make_problem(serving, fast, tight)
    stages, _ = repair_within(problem, missing, kv_tokens=1024, least_tokens=512)
    assert [stage.peer for stage in stages] == [fast.id]
    with pytest.raises(DoesNotFit):
        repair_within(problem, missing, kv_tokens=1024, least_tokens=512, one_numerics=True)


def test_profiles_have_the_advertised_id_and_what_if_peers_that_of_the_peer_they_are_like() -> None:
    profile = peer("a", UNPROMISED)
    [made] = profiles_from_adverts([make_advert(profile)], make_card().id)
    assert made.numerics == UNPROMISED
    assert parse_what_if("+x ram=8GiB bw=10GB/s", [profile]).profile.numerics == UNPROMISED
