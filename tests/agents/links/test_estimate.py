"""The estimate of a link: it follows changes, and lone or disturbed samples do not move it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.links.estimate import LEAST_PROBE, MOST_PROBE, LinkEstimate, bandwidth_of, changed
from meshd.planner.network import transfer_s
from meshd.types import LinkStats

RTTS = st.floats(1e-4, 0.2)
RATES = st.floats(1e5, 1e9)
BEAT_S = 0.5


def beats(estimate: LinkEstimate, rtt_s: float, count: int, now: float) -> float:
    for _ in range(count):
        now += BEAT_S
        estimate.round_trip(rtt_s, now)
    return now


@given(RTTS, RTTS)
def test_a_changed_round_trip_is_seen_within_two_seconds(before: float, after: float) -> None:
    estimate = LinkEstimate()
    now = beats(estimate, before, 10, 0.0)
    now = beats(estimate, after, 4, now)
    assert estimate.hop_s(now) == pytest.approx(after / 2)


@given(RTTS, st.floats(0.0, 5.0))
def test_one_late_heartbeat_changes_nothing(usual: float, late: float) -> None:
    estimate = LinkEstimate()
    now = beats(estimate, usual, 5, 0.0)
    now = beats(estimate, usual + late, 1, now)
    assert estimate.hop_s(now) == pytest.approx(usual / 2)
    assert estimate.rtt_s(now) == pytest.approx(usual)


def test_heartbeats_behind_a_large_message_do_not_count() -> None:
    estimate = LinkEstimate()
    now = beats(estimate, 0.001, 5, 0.0)
    for _ in range(5):
        estimate.disturb(now)
        now += 0.1
        estimate.round_trip(0.05, now)
    assert estimate.hop_s(now) == pytest.approx(0.0005)


def test_under_constant_traffic_the_shortest_round_trip_counts() -> None:
    estimate = LinkEstimate()
    now = beats(estimate, 0.001, 5, 0.0)
    for trip in (0.03, 0.021, 0.06) * 5:
        now += BEAT_S
        estimate.disturb(now - 0.01)
        estimate.round_trip(trip, now)
    assert estimate.hop_s(now) == pytest.approx(0.021 / 2)


@given(st.integers(LEAST_PROBE, 4 << 20), RTTS, RATES)
def test_the_bandwidth_is_found_from_the_time_of_a_probe_if_it_shows(size: int, rtt_s: float, rate: float) -> None:
    elapsed_s = rtt_s + transfer_s(size, rtt_s, rate)
    found = bandwidth_of(size, elapsed_s, rtt_s)
    least_s = transfer_s(size, rtt_s, 1e10)
    if elapsed_s - rtt_s - least_s > 0.2 * elapsed_s + 1e-3:
        assert found == pytest.approx(rate, rel=0.01)
    assert transfer_s(size, rtt_s, found) == pytest.approx(elapsed_s - rtt_s, rel=0.1, abs=0.1 * rtt_s + 4e-4)


@given(RATES, st.sampled_from([0.02, 0.1, 0.5, 2.0, 10.0, 50.0]))
def test_a_changed_bandwidth_counts_from_its_second_sample(before: float, times: float) -> None:
    estimate = LinkEstimate()
    now = 0.0
    for _ in range(4):
        now += 2.0
        assert not estimate.bandwidth(before, now)
    now += 2.0
    after = min(before * times, 9e9)
    assert estimate.bandwidth(after, now)
    assert not estimate.bandwidth(after, now + 0.1)
    assert estimate.bandwidth_bytes_s(now + 0.1) == pytest.approx(after)


def test_a_probe_that_took_as_long_as_predicted_confirms_the_bandwidth() -> None:
    estimate, rtt_s, rate = LinkEstimate(), 0.02, 1e8
    now = beats(estimate, rtt_s, 5, 0.0)
    estimate.bandwidth(rate, now)
    size = estimate.probe_bytes(now)
    for _ in range(5):
        now += 2.0
        assert not estimate.probed(size, rtt_s + transfer_s(size, rtt_s, rate) * 1.05, now)
    assert estimate.bandwidth_bytes_s(now) == pytest.approx(rate)
    assert estimate.probed(size, rtt_s + transfer_s(size, rtt_s, 2e6), now)


def test_two_samples_in_one_direction_replace_the_old_ones_even_if_they_differ() -> None:
    estimate = LinkEstimate()
    for second in range(5):
        estimate.bandwidth(5e5, float(second))
    assert estimate.bandwidth(1.6e7, 5.0)
    assert not estimate.bandwidth(6e7, 5.1)
    assert 1.6e7 <= estimate.bandwidth_bytes_s(5.1) <= 6e7


def test_without_slow_start_a_probe_shows_the_bandwidth_of_a_distant_link() -> None:
    rtt_s, rate = 0.02, 1.25e7
    found = bandwidth_of(250_000, rtt_s + 250_000 / rate, rtt_s, slow_start=False)
    assert found == pytest.approx(rate, rel=0.05)
    estimate = LinkEstimate(slow_start=False)
    estimate.round_trip(rtt_s, 0.0)
    estimate.bandwidth(rate, 0.0)
    assert not estimate.probed(250_000, rtt_s + 250_000 / rate, 0.1)
    assert estimate.bandwidth_bytes_s(0.1) == rate
    stats = estimate.stats(0.1, 50.0)
    assert stats is not None
    assert not stats.slow_start


def test_of_two_samples_the_higher_one_counts() -> None:
    """Probes of other peers that share the link make a sample lower, never higher."""
    estimate = LinkEstimate()
    estimate.bandwidth(2.5e6, 0.0)
    estimate.bandwidth(1.9e6, 2.0)
    assert estimate.bandwidth_bytes_s(2.0) == 2.5e6


def test_one_wild_bandwidth_changes_little() -> None:
    estimate = LinkEstimate()
    for second in range(5):
        estimate.bandwidth(1e7, float(second))
    assert estimate.bandwidth(1e9, 5.0)
    estimate.bandwidth(1e7, 5.1)
    assert estimate.bandwidth_bytes_s(5.1) == pytest.approx(1e7)


def test_the_last_bandwidth_counts_until_there_is_a_newer_one() -> None:
    estimate = LinkEstimate()
    estimate.bandwidth(1e7, 0.0)
    assert estimate.bandwidth_bytes_s(1000.0) == pytest.approx(1e7)


def test_a_probe_occupies_a_link_for_20_ms_within_limits() -> None:
    sizes = []
    for rate in (1e4, 5e6, 1e9):
        estimate = LinkEstimate()
        estimate.bandwidth(rate, 0.0)
        sizes.append(estimate.probe_bytes(0.0))
    assert sizes == [LEAST_PROBE, pytest.approx(100_000, rel=0.01), MOST_PROBE]
    assert LinkEstimate().probe_bytes(0.0) == LEAST_PROBE


def test_nothing_is_told_before_round_trip_and_bandwidth_are_known() -> None:
    estimate = LinkEstimate()
    assert estimate.stats(0.0, 0.0) is None
    estimate.round_trip(0.002, 1.0)
    assert estimate.stats(1.0, 50.0) is None
    estimate.bandwidth(1e7, 2.0)
    assert estimate.stats(4.0, 50.0) == LinkStats(rtt_s=0.002, hop_s=0.001, bandwidth_bytes_s=1e7, measured_at=48.0)


def test_only_noticeable_changes_are_announced_at_once() -> None:
    old = LinkStats(rtt_s=0.01, hop_s=0.005, bandwidth_bytes_s=1e7)
    assert changed(None, old)
    assert not changed(old, LinkStats(rtt_s=0.002, hop_s=0.0053, bandwidth_bytes_s=1.1e7))
    assert changed(old, LinkStats(rtt_s=0.01, hop_s=0.006, bandwidth_bytes_s=1e7))
    assert changed(old, LinkStats(rtt_s=0.01, hop_s=0.005, bandwidth_bytes_s=2e7))
