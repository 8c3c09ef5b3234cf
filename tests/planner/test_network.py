import msgspec
import pytest

from in_process.clusters import make_peer
from meshd.planner.network import UNMEASURED_BANDWIDTH_BYTES_S, UNMEASURED_HOP_S, Network
from meshd.planner.profile import profiles_from_adverts
from meshd.types import Advert, Capability, Holding, LayerRange, LinkStats, ModelId, PeerId, Rates

FAST = LinkStats(rtt_s=0.001, bandwidth_bytes_s=1e8, hop_s=0.0002)
PLAIN = LinkStats(rtt_s=0.004, bandwidth_bytes_s=1e6)


def advert(name: str, rates: Rates, **fields: object) -> Advert:
    capability = Capability(
        backend="native", processor="x", threads=4, memory_total_bytes=100, memory_free_bytes=60, rates=rates, power_w=5.0
    )
    return Advert(peer=PeerId(f"{name}-id"), name=name, incarnation=1, revision=1, version="0", capability=capability, **fields)


def test_a_measured_hop_is_used_before_half_the_round_trip() -> None:
    network = Network({("a", "b"): FAST, ("b", "c"): PLAIN})
    assert network.hop_s("a", "b", 10_000) == pytest.approx(0.0002 + 0.0001)
    assert network.hop_s("b", "c", 10_000) == pytest.approx(0.002 + 0.01)


def test_directions_are_apart() -> None:
    network = Network({("a", "b"): FAST, ("b", "a"): PLAIN})
    assert network.hop_s("a", "b", 0) != network.hop_s("b", "a", 0)


def test_the_other_direction_stands_in() -> None:
    link = Network({("a", "b"): FAST}).link("b", "a")
    assert (link.source, link.latency_s) == ("measured backwards", 0.0002)


def test_an_unmeasured_pair_is_taken_as_slow_and_says_so() -> None:
    link = Network({}).link("a", "b")
    assert link.source == "not measured"
    assert link.hop_s(1000) == UNMEASURED_HOP_S + 1000 / UNMEASURED_BANDWIDTH_BYTES_S
    broken = Network({("a", "b"): msgspec.structs.replace(FAST, bandwidth_bytes_s=0.0)})
    assert broken.link("a", "b").source == "not measured"


def test_a_peer_reaches_itself_at_once() -> None:
    assert Network({}).hop_s("a", "a", 1e9) == 0.0


def test_added_links_win() -> None:
    network = Network({("a", "b"): FAST}).with_links({("a", "b"): PLAIN, ("a", "c"): FAST})
    assert network.stats == {("a", "b"): PLAIN, ("a", "c"): FAST}


def test_adverts_give_links_and_profiles() -> None:
    rates = make_peer("x").rates
    mine = Holding(model=ModelId("m"), layers=LayerRange(0, 4), state="active")
    other = Holding(model=ModelId("n"), layers=LayerRange(0, 4), state="active")
    adverts = [advert("b", rates, links={PeerId("a-id"): PLAIN}), advert("a", rates, holdings=(mine, other))]
    assert Network.from_adverts(adverts).stats == {("b-id", "a-id"): PLAIN}
    profiles = profiles_from_adverts(adverts, ModelId("m"))
    assert [profile.name for profile in profiles] == ["a", "b"]
    assert profiles[0].holdings == (mine,)
    assert (profiles[1].memory_free_bytes, profiles[1].threads, profiles[1].power_w) == (60, 4, 5.0)


def test_a_peer_without_a_rate_is_not_measured() -> None:
    rates = make_peer("x").rates
    assert profiles_from_adverts([advert("a", rates)], ModelId("m"))[0].measured
    for field in ("decode_bytes_s", "prefill_flops_s", "attention_bytes_s"):
        broken = msgspec.structs.replace(rates, **{field: 0.0})
        assert not profiles_from_adverts([advert("a", broken)], ModelId("m"))[0].measured
