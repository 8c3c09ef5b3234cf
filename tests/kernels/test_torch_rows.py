"""The torch backend on the CPU: the bits of a row do not depend on how many other rows are computed with it, nor on its place."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from meshd.kernels.threads import Workers
from meshd.kernels.torch import trials
from meshd.kernels.torch.ops import gated, rms_norm, soft_capped
from meshd.kernels.torch.products import Device, make_product
from meshd.kernels.weights.layers import Projection
from meshd.kernels.weights.matrices import BlockMatrix, DenseMatrix, Matrix

RNG = np.random.default_rng(3)
PARTS = [(0, 1), (129, 130), (0, 2), (5, 8), (1, 5), (60, 70), (3, 66), (2, 67), (1, 130)]
"""First row and end of each part of 130 rows. A full block has 64 rows."""


def block_matrix(bits: int, outputs: int, blocks: int, *, shifted: bool) -> BlockMatrix:
    codes = RNG.integers(0, 256, (outputs, blocks, 32 * bits // 8), np.uint8)
    scale = RNG.random((outputs, blocks), np.float32)
    return BlockMatrix(bits, 32, codes, scale, RNG.random((outputs, blocks), np.float32) if shifted else None)


def dense_matrix(outputs: int, columns: int) -> DenseMatrix:
    return DenseMatrix(RNG.standard_normal((outputs, columns), np.float32))


def check_parts(compute: Callable[[torch.Tensor], torch.Tensor], columns: int) -> None:
    x = torch.from_numpy(RNG.standard_normal((130, columns), np.float32) * 3)
    together = compute(x)
    assert len(together) == len(x)
    for start, end in PARTS:
        assert torch.equal(compute(x[start:end]), together[start:end]), (start, end)


@pytest.mark.parametrize(
    "matrix",
    [
        block_matrix(4, 96, 8, shifted=True),
        block_matrix(8, 700, 18, shifted=False),
        block_matrix(4, 513, 48, shifted=False),
        dense_matrix(576, 200),
        dense_matrix(33, 576),
        dense_matrix(1, 576),
    ],
    ids=lambda matrix: f"{type(matrix).__name__} {matrix.shape}",
)
def test_a_product_gives_a_row_the_same_bits_among_any_others(matrix: Matrix) -> None:
    check_parts(make_product(Projection((matrix,)), Device("cpu", Workers(1))), matrix.shape[1])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped"])
@pytest.mark.parametrize("ffn", [96, 100, 101, 1536, 2047])
def test_an_activation_gives_a_row_the_same_bits_among_any_others(activation: str, ffn: int) -> None:
    """Torch computes the last elements of contiguous memory by another function: 101 is no multiple of what it takes at once."""
    check_parts(lambda x: gated(x, activation), 2 * ffn)


@pytest.mark.parametrize("width", [64, 100, 2047])
def test_norms_and_caps_give_a_row_the_same_bits_among_any_others(width: int) -> None:
    weight = torch.from_numpy(RNG.random(width, np.float32))
    check_parts(lambda x: rms_norm(x, weight, 1e-5), width)
    check_parts(lambda x: soft_capped(x, 30.0), width)


def test_a_block_has_only_numbers_of_rows_that_a_trial_found_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where 1 to 4 rows have bits of their own: products of so few rows are made otherwise here."""
    plain = trials.multiply

    def multiply(x: torch.Tensor, *rest: torch.Tensor, **options: int) -> torch.Tensor:
        return plain(x, *rest, **options) * (1.5 if len(x) <= 4 else 1.0)

    monkeypatch.setattr(trials, "multiply", multiply)
    trials.exact_counts.cache_clear()
    counts = trials.exact_counts(64, 32, 2)
    trials.exact_counts.cache_clear()
    assert counts == tuple(range(8, 65, 8))
    x = torch.arange(130.0)[:, None].expand(130, 3)
    assert [len(trials.fill(x[:rows], counts)) for rows in (1, 8, 9, 64, 65, 128, 130)] == [8, 8, 16, 64, 72, 128, 136]
    assert trials.fill(x[:9], counts)[8:].eq(8).all()
