import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.clusters import make_peer
from meshd.planner.model.calibrate import LEAST, MOST, Calibration, Ratio

TIMES = st.floats(min_value=1e-9, max_value=1e9)


@given(st.lists(st.tuples(TIMES, TIMES), max_size=30))
def test_a_ratio_stays_in_its_bounds(samples: list[tuple[float, float]]) -> None:
    ratio = Ratio()
    for measured, predicted in samples:
        ratio = ratio.observed(measured, predicted)
        assert LEAST <= ratio.value <= MOST
    assert ratio.samples == len(samples)


@pytest.mark.parametrize("true", [0.6, 1.0, 1.7])
def test_a_steady_error_is_learned(true: float) -> None:
    ratio = Ratio()
    for _ in range(40):
        ratio = ratio.observed(true, 1.0)
    assert ratio.value == pytest.approx(true, rel=1e-3)


def test_a_ratio_far_from_1_is_flagged() -> None:
    near, far = Ratio(), Ratio()
    for _ in range(20):
        near, far = near.observed(1.2, 1.0), far.observed(9.0, 1.0)
    assert not Ratio().flagged
    assert not near.flagged
    assert far.flagged
    assert far.value <= MOST


def test_one_wild_sample_moves_little() -> None:
    assert Ratio().observed(1e6, 1.0).value == pytest.approx(1.2)
    assert Ratio().observed(1e-6, 1.0).value == pytest.approx(0.9)


def test_samples_with_a_time_of_zero_or_less_are_ignored() -> None:
    assert Ratio().observed(0.0, 1.0) == Ratio().observed(1.0, 0.0) == Ratio().observed(-1.0, 1.0) == Ratio()


def test_ratios_are_kept_by_peer_and_phase_and_reach_the_profiles() -> None:
    a, b = make_peer("a"), make_peer("b")
    calibration = Calibration().observed(a.id, "decode", 2.0, 1.0).observed(b.id, "prefill", 0.5, 1.0)
    slow, quick = calibration.applied((a, b))
    assert (slow.decode_factor, slow.prefill_factor) == (pytest.approx(1.2), 1.0)
    assert (quick.decode_factor, quick.prefill_factor) == (1.0, pytest.approx(0.9))
    assert calibration.without(a.id).applied((a,)) == (msgspec.structs.replace(a),)
