"""Quantising at load, and the makers of test weights in every kind."""

import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantisers import quantised

from meshd.errors import ModelFileError
from meshd.kernels.quant import KINDS, dequantise, load_matrix
from meshd.kernels.quantise import QUANTS, kind_for, requantise
from meshd.types import Tensor


def tensor_of(values: np.ndarray, kind: str = "F32") -> Tensor:
    raw = quantised(values.reshape(-1, values.shape[-1]), kind)
    return Tensor("some.weight", kind, values.shape, memoryview(raw.tobytes()))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def error(made: Tensor, values: np.ndarray) -> float:
    """RMS, as a part of the weights' RMS."""
    return float(np.sqrt(np.mean(np.square(dequantise(made) - values)) / np.mean(np.square(values))))


@pytest.mark.parametrize(
    ("shape", "q8", "q4"),
    [((4, 64), "Q8_0", "Q4_1"), ((2, 4, 32), "Q8_0", "Q4_1"), ((4, 48), None, None), ((64,), None, None), ((4, 16), None, None)],
)
def test_only_matrices_of_whole_blocks_are_quantised(shape: tuple[int, ...], q8: str | None, q4: str | None) -> None:
    assert (kind_for(shape, "q8"), kind_for(shape, "q4")) == (q8, q4)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(-30, 15), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_eight_bits_are_ggmls_to_the_bit(rows: int, blocks: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.standard_normal((rows, 32 * blocks)), exponent).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    values[0, :32] = np.arange(32) - 127  # with the next line, codes at halves
    values[0, 31] = 254
    right = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()
    made = requantise(tensor_of(values), "Q8_0")
    assert (made.kind, made.shape, bytes(made.data)) == ("Q8_0", values.shape, right)


def test_four_bits_lie_nearer_than_those_of_plain_rounding() -> None:
    values = normal(512, 512)
    searched = error(requantise(tensor_of(values), "Q4_1"), values)
    assert searched < 0.0725
    for kind, gain in (("Q4_0", 0.86), ("Q4_1", 0.93), ("Q4_K", 0.95)):
        assert searched < gain * error(tensor_of(values, kind), values), kind


@given(st.integers(0, 1 << 32), st.floats(-20, 8), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_four_bits_never_lie_further_than_those_of_plain_rounding(seed: int, exponent: float, offset: float) -> None:
    """Of any block by more than what float16 makes of scale and minimum."""
    values = np.random.default_rng(seed).standard_normal((64, 32)).astype(np.float32) + np.float32(offset)
    values *= np.float32(2.0**exponent)
    both = requantise(tensor_of(values), "Q4_1"), tensor_of(values, "Q4_1")
    searched, plain = (np.square(dequantise(made) - values).sum(axis=1) for made in both)
    rounding = 2.0**-11 * 2 * abs(values).max(axis=1) + 2.0**-25 * 16
    assert (np.sqrt(searched) <= np.sqrt(plain) + np.sqrt(32) * rounding).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_what_lies_on_a_grid_is_found_again(quant: str) -> None:
    rng = np.random.default_rng(5)
    steps = rng.integers(0, 16, (40, 64)) if quant == "q4" else rng.integers(-127, 128, (40, 64))
    top = 15 if quant == "q4" else 127
    steps[:, ::32], steps[:, 1::32] = top, 0 if quant == "q4" else -top
    values = (steps * 0.25 - (3.5 if quant == "q4" else 0)).astype(np.float32)
    values[3] = 0.75 if quant == "q4" else 0  # one of a kind
    assert np.array_equal(dequantise(requantise(tensor_of(values), QUANTS[quant])), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", QUANTS)
def test_any_kind_can_be_quantised_part_by_part(kind: str, quant: str) -> None:
    source = tensor_of(normal(3, 400, 256), kind)
    made = requantise(source, QUANTS[quant])
    assert made.shape == source.shape
    assert error(made, dequantise(source)) < (0.01 if quant == "q8" else 0.09)
    again = requantise(Tensor("x", "F32", source.shape, memoryview(dequantise(source).tobytes())), QUANTS[quant])
    assert bytes(again.data) == bytes(made.data)
    assert load_matrix(Tensor("x", made.kind, (1200, 256), made.data)).shape == (1200, 256)


@pytest.mark.parametrize("quant", QUANTS)
def test_quantising_takes_little_beside_its_result(quant: str) -> None:
    source = Tensor("x", "F16", (4096, 4096), memoryview(np.tile(normal(8, 4096).astype(np.float16), (512, 1)).tobytes()))
    tracemalloc.start()
    try:
        made = requantise(source, QUANTS[quant])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= len(made.data) + (8 << 20)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(quant: str, value: float) -> None:
    values = normal(3, 64)
    values[1, 40] = value
    with pytest.raises(ModelFileError, match=r"tensor some\.weight .* NaN or infinite"):
        requantise(Tensor("some.weight", "F32", (3, 64), memoryview(values.tobytes())), QUANTS[quant])


@pytest.mark.parametrize(("quant", "value"), [("q8", 1e7), ("q8", -3e38), ("q4", -7e4), ("q4", 2e6), ("q4", 3e38)])
def test_weights_too_large_for_a_half_precision_scale_are_named(quant: str, value: float) -> None:
    values = normal(3, 64)
    values[1, 40] = value
    values[2, 3] = -value
    with pytest.raises(ModelFileError, match=r"tensor some\.weight .* too large for Q"):
        requantise(tensor_of(values), QUANTS[quant])


def test_rows_of_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ModelFileError, match="rows of 48 are not whole blocks"):
        requantise(tensor_of(normal(2, 48)), "Q8_0")


def test_weights_too_small_for_a_scale_become_zero() -> None:
    values = np.full((1, 64), 1e-40, np.float32)
    values[0, :32] = 1e-12
    for kind in QUANTS.values():
        assert not dequantise(requantise(tensor_of(values), kind)).any()


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
def test_the_makers_of_test_weights_are_right(kind: str, most: float) -> None:
    values = normal(64, 512)
    values[5, :256] = 0
    made = tensor_of(values, kind)
    assert 0.3 * most < error(made, values) < most
    assert not dequantise(made)[5, :256].any()
