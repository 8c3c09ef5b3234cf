"""Measured rates, and the synthetic weights with which they are measured."""

import time

import numpy as np
import pytest

from meshd.errors import ConfigError
from meshd.kernels.measure import SyntheticWeights, measure, medians_s
from meshd.kernels.registry import available_backends, make_backend
from meshd.kernels.weights.load import dequantise
from meshd.types import LayerRange
from tiny.llama import tiny_spec


@pytest.mark.parametrize("name", available_backends())
def test_rates_are_of_the_right_order(name: str) -> None:
    """The bounds allow for a busy machine; a wrong unit would still fail."""
    measured = measure(name, threads=1, budget_s=0.2)
    assert 1e6 < measured.decode_bytes_s < 1e12
    assert 1e8 < measured.prefill_flops_s < 1e14
    assert 1e8 < measured.memory_bytes_s < 1e13
    assert 1e6 < measured.attention_bytes_s <= measured.memory_bytes_s * 1.001
    assert 0 <= measured.layer_overhead_s < 1


def test_workloads_take_turns_until_the_budget_is_spent() -> None:
    turns: list[int] = []
    times = medians_s([lambda: turns.append(0), lambda: turns.append(1)], 0.01)
    assert turns == [0, 1] * (len(turns) // 2)
    assert len(turns) > 2
    assert all(0 <= seconds < 0.01 for seconds in times)


def test_every_workload_is_timed_at_least_once() -> None:
    started = time.perf_counter()
    times = medians_s([lambda: None, lambda: None], 0.0)
    assert len(times) == 2
    assert time.perf_counter() - started < 1


def test_synthetic_weights_are_finite_repeatable_and_differ_by_name() -> None:
    weights = SyntheticWeights(tiny_spec())
    one = dequantise(weights.tensor("blk.0.attn_q.weight"))
    assert np.isfinite(one).all()
    assert 0.01 < one.std() < 0.2
    assert abs(one.mean()) < 0.02
    assert np.array_equal(one, dequantise(weights.tensor("blk.0.attn_q.weight")))
    assert not np.array_equal(one, dequantise(weights.tensor("blk.1.attn_q.weight")))


def test_a_whole_model_of_synthetic_weights_can_be_loaded() -> None:
    spec = tiny_spec(layers=1)
    make_backend("torch", 1).load(spec, LayerRange(0, 1), SyntheticWeights(spec), embedding=True, head=True).close()


def test_an_unknown_backend_or_no_threads_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no backend 'cuda'"):
        make_backend("cuda", 1)
    with pytest.raises(ConfigError, match="0 threads"):
        make_backend("torch", 0)
