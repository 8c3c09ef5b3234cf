"""Quantisation at import, and the quantisers that make test weights of every kind."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.kernels.weights.load import dequantise
from meshd.models.importing.quantise import quantise
from meshd.models.importing.quants import QUANTS
from meshd.types import Tensor
from reference.quantisers import quantised


def tensor_of(values: np.ndarray, kind: str = "F32") -> Tensor:
    raw = quantised(values.reshape(-1, values.shape[-1]), kind)
    return Tensor("some.weight", kind, values.shape, memoryview(raw.tobytes()))


def requantised(values: np.ndarray, kind: str) -> Tensor:
    return Tensor("some.weight", kind, values.shape, memoryview(quantise(values, kind).tobytes()))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def error(made: Tensor, values: np.ndarray) -> float:
    """RMS error relative to the weights' RMS."""
    return float(np.sqrt(np.mean(np.square(dequantise(made) - values)) / np.mean(np.square(values))))


@given(st.integers(1, 20), st.integers(1, 5), st.integers(-30, 15), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_q8_0_has_the_same_bits_as_ggml(rows: int, blocks: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.standard_normal((rows, 32 * blocks)), exponent).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    values[0, :32] = np.arange(32) - 127  # 254 makes the scale 2, so odd weights are ties in rounding
    values[0, 31] = 254
    right = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()
    made = requantised(values, "Q8_0")
    assert (made.kind, made.shape, bytes(made.data)) == ("Q8_0", values.shape, right)


def test_q4_1_has_a_smaller_error_than_plain_rounding() -> None:
    values = normal(512, 512)
    searched = error(requantised(values, "Q4_1"), values)
    assert searched < 0.0725
    for kind, gain in (("Q4_0", 0.86), ("Q4_1", 0.93), ("Q4_K", 0.95)):
        assert searched < gain * error(tensor_of(values, kind), values), kind


@given(st.integers(0, 1 << 32), st.floats(-20, 8), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_no_block_of_q4_1_has_a_larger_error_than_plain_rounding(seed: int, exponent: float, offset: float) -> None:
    """The tolerance is the error of rounding a block's scale and minimum to float16."""
    values = np.random.default_rng(seed).standard_normal((64, 32)).astype(np.float32) + np.float32(offset)
    values *= np.float32(2.0**exponent)
    both = requantised(values, "Q4_1"), tensor_of(values, "Q4_1")
    searched, plain = (np.square(dequantise(made) - values).sum(axis=1) for made in both)
    rounding = 2.0**-11 * 2 * abs(values).max(axis=1) + 2.0**-25 * 16
    assert (np.sqrt(searched) <= np.sqrt(plain) + np.sqrt(32) * rounding).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_weights_on_a_grid_are_restored_exactly(quant: str) -> None:
    rng = np.random.default_rng(5)
    steps = rng.integers(0, 16, (40, 64)) if quant == "q4" else rng.integers(-127, 128, (40, 64))
    top = 15 if quant == "q4" else 127
    steps[:, ::32], steps[:, 1::32] = top, 0 if quant == "q4" else -top
    values = (steps * 0.25 - (3.5 if quant == "q4" else 0)).astype(np.float32)
    values[3] = 0.75 if quant == "q4" else 0  # a row of equal weights
    assert np.array_equal(dequantise(requantised(values, QUANTS[quant])), values)


@pytest.mark.parametrize(("quant", "value"), [("q8", 1e7), ("q8", -3e38), ("q4", -7e4), ("q4", 2e6), ("q4", 3e38)])
def test_weights_too_large_for_a_half_precision_scale_are_an_error(quant: str, value: float) -> None:
    values = normal(3, 64)
    values[1, 40] = value
    values[2, 3] = -value
    with pytest.raises(ValueError, match="too large for Q"):
        requantised(values, QUANTS[quant])


def test_weights_too_small_for_a_scale_become_zero() -> None:
    values = np.full((1, 64), 1e-40, np.float32)
    values[0, :32] = 1e-12
    for kind in QUANTS.values():
        assert not dequantise(requantised(values, kind)).any()


@pytest.mark.parametrize(
    ("kind", "most"),
    {
        "Q4_0": 0.09,
        "Q4_1": 0.08,
        "Q5_0": 0.045,
        "Q5_1": 0.04,
        "Q8_0": 0.006,
        "Q4_K": 0.08,
        "Q5_K": 0.04,
        "Q6_K": 0.02,
        "IQ4_NL": 0.085,
        "MXFP4": 0.13,
    }.items(),
)
def test_the_quantisers_of_test_weights_have_the_error_of_their_kind(kind: str, most: float) -> None:
    values = normal(64, 512)
    values[5, :256] = 0
    made = tensor_of(values, kind)
    assert 0.3 * most < error(made, values) < most
    assert not dequantise(made)[5, :256].any()


def test_quantised_blocks_are_at_least_as_good_as_those_of_the_gguf_package() -> None:
    values = np.random.default_rng(1).standard_normal((256, 256), dtype=np.float32)
    for kind in ("Q8_0", "Q4_1"):
        ours = gguf.quants.dequantize(quantise(values.reshape(-1), kind).reshape(256, -1), gguf.GGMLQuantizationType[kind])
        kind_ = gguf.GGMLQuantizationType[kind]
        theirs = gguf.quants.dequantize(gguf.quants.quantize(values, kind_), kind_)
        assert np.square(ours - values).sum() <= np.square(theirs - values).sum() * 1.001
    edges = np.zeros((3, 32), np.float32)
    edges[1], edges[2, 0] = 7.0, 1e-9
    for kind in ("Q8_0", "Q4_1"):
        again = gguf.quants.dequantize(quantise(edges.reshape(-1), kind).reshape(3, -1), gguf.GGMLQuantizationType[kind])
        np.testing.assert_allclose(again, edges, atol=7 / 127 / 100)
        with pytest.raises(ValueError, match="too large"):
            quantise(np.full(32, [1e30, -1e30] * 16, np.float32).reshape(-1), kind)
