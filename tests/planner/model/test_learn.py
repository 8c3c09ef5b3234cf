"""A peer's factors: they follow real steps, stay in bounds, ignore lone outliers, and return to 1 without steps."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.planner.model.learn import GRACE_S, HALF_LIFE_S, OUTLIER, Factor, StepLearner, Typical
from meshd.planner.profile import DEFAULT_OVERHEAD_S, LEAST_FACTOR, MOST_FACTOR, context_class, factor_of, prefill_class
from meshd.types import LearnedRates

TIMES = st.floats(min_value=1e-9, max_value=1e9)


@given(st.lists(st.tuples(TIMES, TIMES, st.floats(0, 1e6)), max_size=30))
def test_a_factor_stays_in_its_bounds(samples: list[tuple[float, float, float]]) -> None:
    factor, now = Factor(), 0.0
    for measured, predicted, later in samples:
        now += later
        factor = factor.observed(measured, predicted, now)
        assert LEAST_FACTOR <= factor.value <= MOST_FACTOR
        assert LEAST_FACTOR <= factor.current(now + later) <= MOST_FACTOR


@given(st.floats(0.3, 6.0), st.floats(0.3, 6.0), st.sampled_from([0.002, 0.05, 0.5]))
def test_a_change_of_load_is_learned_within_four_seconds_of_computing(before: float, after: float, predicted_s: float) -> None:
    factor, spent = Factor(), 0.0
    for true in (before, after):
        until, steps = spent + 4.0, 0
        while spent < until or steps < 3:  # each step counts at most four times as much as the last ones
            factor = factor.observed(true * predicted_s, predicted_s, spent)
            spent, steps = spent + true * predicted_s, steps + 1
        assert factor.current(spent) == pytest.approx(true, rel=0.5)


@given(st.floats(0.5, 2.0), st.floats(1e-9, 1e9))
def test_a_step_counts_at_most_four_times_as_much_as_the_usual_one(true: float, wild: float) -> None:
    factor = Factor()
    for step in range(200):
        factor = factor.observed(true * 0.02, 0.02, step * 0.02)
    after = factor.observed(wild, 0.02, 4.0).value
    assert factor.value / OUTLIER * 0.999 <= after <= factor.value * OUTLIER * 1.001
    if wild <= true * 0.02 * OUTLIER:
        assert after == pytest.approx(true, rel=0.3)


def test_a_factor_is_steady_where_steps_are_not() -> None:
    noise, factor, seen = random.Random(3), Factor(), []
    for step in range(1000):
        factor = factor.observed(0.02 * noise.lognormvariate(0.0, 0.4), 0.02, step * 0.02)
        seen.append(factor.value)
    mean = math.exp(0.4**2 / 2)
    assert all(0.9 * mean < value < 1.3 * mean for value in seen[400:])  # time passes in slow steps mostly


def test_a_second_of_other_work_changes_a_factor_little_and_not_for_long() -> None:
    factor, now = Factor(), 0.0
    for seconds, true in ((20.0, 1.0), (1.0, 2.0)):
        until = now + seconds
        while now < until:
            factor = factor.observed(0.05 * true, 0.05, now)
            now += 0.05 * true
    assert factor.value < 1.3
    for _ in range(40):
        factor = factor.observed(0.05, 0.05, now)
    assert factor.value < 1.15


def test_one_prompt_that_took_long_does_not_spoil_the_next_predictions() -> None:
    typical = Typical().observed(2.4, 1.0, 0.0)
    assert typical.value == 1.0
    for second in (1.0, 2.0):
        typical = typical.observed(0.65, 1.0, second)
    assert typical.value == 0.65
    assert typical.observed(3.0, 1.0, 3.0).value == pytest.approx(1.0, rel=0.4)
    for second in (3.0, 4.0, 5.0):
        typical = typical.observed(2.0, 1.0, second)
    assert typical.value == 2.0  # load that stays
    assert typical.current(5.0 + GRACE_S + 20 * HALF_LIFE_S) == pytest.approx(1.0, abs=0.01)
    assert typical.observed(0.0, 1.0, 6.0) == typical


def test_a_factor_returns_to_1_without_steps() -> None:
    factor = Factor()
    for step in range(100):
        factor = factor.observed(0.4, 0.1, float(step))
    assert factor.current(99.0) == pytest.approx(4.0, rel=0.05)
    assert factor.current(99.0 + GRACE_S) == factor.value
    assert factor.current(99.0 + GRACE_S + HALF_LIFE_S) == pytest.approx(2.0, rel=0.05)
    assert factor.current(99.0 + 20 * HALF_LIFE_S) == pytest.approx(1.0, abs=0.01)


def test_times_that_are_not_positive_are_ignored() -> None:
    new = Factor()
    assert new.observed(0.0, 1.0, 1.0) == new.observed(1.0, 0.0, 1.0) == new.observed(-1.0, 1.0, 1.0) == new
    assert new.observed(float("inf"), 1.0, 1.0) == new.observed(float("nan"), 1.0, 1.0) == new


def test_phases_and_contexts_are_learned_apart() -> None:
    learner = StepLearner()
    for step in range(100):
        learner.observe("decode", context_class(100), 0.2, 0.1, step)
        learner.observe("decode", context_class(2000), 0.3, 0.1, step)
        learner.observe("prefill", prefill_class(0, is_whole=True), 0.05, 0.1, step)
        learner.observe("prefill", prefill_class(0, is_whole=False), 0.15, 0.1, step)
    learned = learner.learned(99.0)
    assert factor_of(learned.decode, context_class(128)) == pytest.approx(2.0, rel=0.05)
    assert factor_of(learned.decode, context_class(1500)) == pytest.approx(3.0, rel=0.05)
    assert factor_of(learned.prefill, prefill_class(0, is_whole=True)) == pytest.approx(0.5, rel=0.05)
    assert factor_of(learned.prefill, prefill_class(128, is_whole=False)) == pytest.approx(1.5, rel=0.05)


def test_a_context_without_steps_of_its_own_takes_the_factor_of_the_latest_ones() -> None:
    learner = StepLearner()
    for step in range(100):
        learner.observe("decode", context_class(100), 0.2, 0.1, step)
    assert factor_of(learner.learned(99.0).decode, context_class(10_000)) == pytest.approx(2.0, rel=0.05)
    assert learner.learned(99.0).prefill == ()


def test_a_peer_without_steps_has_learned_nothing() -> None:
    assert StepLearner().learned(5.0) == LearnedRates()
    assert factor_of((), 1) == 1.0
    assert factor_of((0.0, 1e18), 0) == LEAST_FACTOR
    assert factor_of((0.0, 1e18), 1) == MOST_FACTOR


def test_the_overhead_is_learned_and_returns_to_the_usual_one() -> None:
    learner = StepLearner()
    for step in range(60):
        learner.observe_overhead(0.003, float(step))
    learner.observe_overhead(5.0, 60.0)
    learned = learner.learned(60.0).step_overhead_s
    assert learned is not None
    assert 0.0027 < learned < 0.0042
    later = learner.learned(60.0 + 20 * HALF_LIFE_S).step_overhead_s
    assert later == pytest.approx(DEFAULT_OVERHEAD_S, rel=0.01)
