"""The offset of another clock: right within the stated error, whatever the network does."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.links.meters.clock_offset import DRIFT, SAMPLES, ClockOffset


def test_without_a_round_trip_nothing_is_known() -> None:
    assert ClockOffset().when(5.0) is None
    assert ClockOffset().to_ours(5.0) is None


@given(seed=st.integers(0, 2**32), offset=st.floats(-1e6, 1e6), rate=st.floats(-DRIFT, DRIFT), asymmetry=st.floats(0, 1))
def test_the_true_time_is_within_the_stated_error(seed: int, offset: float, rate: float, asymmetry: float) -> None:
    random_ = random.Random(seed)
    clock = ClockOffset()

    def theirs(at: float) -> float:
        return at + offset + rate * at

    now = 0.0
    for _ in range(200):
        now += 0.5
        trip = random_.expovariate(100)
        clock.add(now, now + trip, theirs(now + asymmetry * trip))
    for _ in range(50):
        at = random_.uniform(-20.0, now + 20.0)
        found = clock.to_ours(theirs(at))
        assert found is not None
        assert abs(found.at - at) <= found.error + 1e-6 + DRIFT * found.error


def test_the_shortest_round_trip_of_a_period_counts() -> None:
    clock = ClockOffset()
    clock.add(0.0, 0.2, 1000.2)  # the way there took all of the time
    clock.add(0.5, 0.51, 1000.505)
    clock.add(1.0, 1.4, 1001.0)
    found = clock.when(0.505)
    assert found is not None
    assert found.offset == pytest.approx(1000.0)
    assert found.error == pytest.approx(0.005)


def test_the_order_of_the_other_clocks_readings_stays() -> None:
    clock = ClockOffset()
    for number in range(20):
        trip = 0.3 if number % 2 else 0.01
        clock.add(3.0 * number, 3.0 * number + trip, 3.0 * number + (trip if number % 3 else 0) + 50.0)
    times = [clock.to_ours(50.0 + 0.01 * step) for step in range(6000)]
    ours = [found.at for found in times if found is not None]
    assert ours == sorted(ours)


def test_samples_are_bounded() -> None:
    clock = ClockOffset()
    for number in range(10 * SAMPLES):
        clock.add(5.0 * number, 5.0 * number + 0.1, 5.0 * number)
    assert len(clock._samples) == SAMPLES
