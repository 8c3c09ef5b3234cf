import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.clusters import make_advert, make_peer
from meshd.planner.network import UNMEASURED_BANDWIDTH_BYTES_S, UNMEASURED_HOP_S, Network, transfer_s
from meshd.types import LinkStats

FAST = LinkStats(rtt_s=0.001, bandwidth_bytes_s=1e8, hop_s=0.0002)
PLAIN = LinkStats(rtt_s=0.004, bandwidth_bytes_s=1e6)


def test_a_measured_hop_is_used_before_half_the_round_trip() -> None:
    network = Network({("a", "b"): FAST, ("b", "c"): PLAIN})
    assert network.hop_s("a", "b", 10_000) == pytest.approx(0.0002 + 0.0001)
    assert network.hop_s("b", "c", 10_000) == pytest.approx(0.002 + 0.01)


def test_the_two_directions_of_a_pair_differ() -> None:
    network = Network({("a", "b"): FAST, ("b", "a"): PLAIN})
    assert network.hop_s("a", "b", 0) != network.hop_s("b", "a", 0)


def test_a_link_measured_only_backwards_is_used() -> None:
    link = Network({("a", "b"): FAST}).link("b", "a")
    assert (link.source, link.latency_s) == ("measured backwards", 0.0002)


def test_an_unmeasured_link_is_assumed_slow_and_marked() -> None:
    link = Network({}).link("a", "b")
    assert link.source == "not measured"
    assert link.hop_s(1000) == UNMEASURED_HOP_S + 1000 / UNMEASURED_BANDWIDTH_BYTES_S
    broken = Network({("a", "b"): msgspec.structs.replace(FAST, bandwidth_bytes_s=0.0)})
    assert broken.link("a", "b").source == "not measured"


def test_a_sender_without_slow_start_fills_a_distant_link_at_once() -> None:
    distant = LinkStats(rtt_s=0.02, bandwidth_bytes_s=1e8, hop_s=0.01)
    network = Network({("a", "b"): distant, ("b", "a"): msgspec.structs.replace(distant, slow_start=False)})
    assert network.hop_s("b", "a", 295_000) == pytest.approx(0.01 + 0.00295)
    assert network.hop_s("a", "b", 295_000) > 0.01 + 4 * 0.02


def test_a_large_message_waits_for_slow_start_on_a_distant_link() -> None:
    assert transfer_s(295_000, 0.0, 1e8) == pytest.approx(0.00295)
    assert transfer_s(14_000, 0.02, 1e8) == pytest.approx(0.00014)
    windows = 14_600 * (1 + 2 + 4 + 8)  # sent in four round trips; the rest fits into the fifth window
    assert transfer_s(295_000, 0.02, 1e8) == pytest.approx(4 * 0.02 + (295_000 - windows) / 1e8)
    assert transfer_s(10_000_000, 0.02, 2.5e6) == pytest.approx(4.0, rel=0.02)


@given(st.floats(1, 1e8), st.floats(0, 0.5), st.floats(1e4, 1e9))
def test_a_transfer_is_never_faster_than_its_bandwidth_and_grows_with_size(size: float, rtt_s: float, rate: float) -> None:
    seconds = transfer_s(size, rtt_s, rate)
    assert seconds >= size / rate * (1 - 1e-9)
    assert transfer_s(size * 1.5, rtt_s, rate) >= seconds
    assert transfer_s(size, rtt_s, rate * 2) <= seconds * (1 + 1e-9)


def test_a_message_from_a_peer_to_itself_takes_no_time() -> None:
    assert Network({}).hop_s("a", "a", 1e9) == 0.0


def test_added_links_replace_measured_ones() -> None:
    network = Network({("a", "b"): FAST}).with_links({("a", "b"): PLAIN, ("a", "c"): FAST})
    assert network.stats == {("a", "b"): PLAIN, ("a", "c"): FAST}


def test_each_advert_has_the_links_that_its_peer_sends_on() -> None:
    a, b = make_peer("a"), make_peer("b")
    one_way = msgspec.structs.replace(make_advert(b), links={a.id: PLAIN})
    assert Network.from_adverts([one_way, make_advert(a)]).stats == {(b.id, a.id): PLAIN}
