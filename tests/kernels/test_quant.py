"""GGUF's kinds, held against the `gguf` package."""

import gguf
import numpy as np
import pytest

from meshd.errors import ModelFileError
from meshd.kernels.quant import BlockMatrix, DenseMatrix, dequantise, dequantise_rows, load_matrix, stack, unpack_codes, widen_bf16
from meshd.types import Tensor

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q6_K"]
ROWS, COLUMNS = 6, 512


def random_tensor(kind: str, rows: int = ROWS) -> tuple[Tensor, np.ndarray]:
    """A tensor of random bits, all that a file may hold, with its values by other code."""
    rng = np.random.default_rng(7)
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind in {"F32", "F16", "BF16"}:
        raw = gguf.quants.quantize(rng.standard_normal((rows, COLUMNS), dtype=np.float32), gguf.GGMLQuantizationType[kind])
    else:
        blocks = rng.integers(0, 256, (rows * COLUMNS // weights, size), np.uint8)
        for at in {"Q6_K": (208,), "Q4_1": (0, 2)}.get(kind, (0,)):
            blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
        raw = blocks.reshape(rows, -1)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(rows, COLUMNS)
    return Tensor(f"{kind}.weight", kind, (rows, COLUMNS), memoryview(np.ascontiguousarray(raw).tobytes())), values


def values_of(matrix: BlockMatrix | DenseMatrix) -> np.ndarray:
    if isinstance(matrix, DenseMatrix):
        return widen_bf16(matrix.values) if matrix.values.dtype == np.uint16 else matrix.values.astype(np.float32)
    codes = unpack_codes(matrix).astype(np.float32).reshape(*matrix.scale.shape, matrix.block)
    weights = matrix.scale[..., None] * (codes - matrix.zero)
    if matrix.shift is not None:
        weights = weights + matrix.shift[..., None]
    return weights.reshape(matrix.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_gguf(kind: str) -> None:
    tensor, values = random_tensor(kind)
    assert np.array_equal(dequantise(tensor), values)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_gathered_without_the_rest(kind: str) -> None:
    tensor, values = random_tensor(kind)
    assert np.array_equal(dequantise_rows(tensor, np.array([4, 0, 4], np.int32)), values[[4, 0, 4]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_for_computing_has_the_same_values(kind: str) -> None:
    tensor, values = random_tensor(kind)
    matrix = load_matrix(tensor)
    assert matrix.shape == (ROWS, COLUMNS)
    np.testing.assert_allclose(values_of(matrix), values, rtol=1e-5, atol=1e-5)


def test_alike_matrices_become_one() -> None:
    (one, first), (two, second) = random_tensor("Q4_1"), random_tensor("Q4_1", rows=2)
    (stacked,) = stack([load_matrix(one), load_matrix(two)])
    np.testing.assert_allclose(values_of(stacked), np.concatenate([first, second]), rtol=1e-5, atol=1e-5)


def test_unlike_matrices_stay_apart() -> None:
    kinds = ["Q4_1", "Q4_0", "F16"]
    matrices = [load_matrix(random_tensor(kind)[0]) for kind in kinds]
    assert stack(matrices) == tuple(matrices)
    assert len(stack(matrices[::-1])) == 3


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ModelFileError, match="IQ2_XS"):
        dequantise(Tensor("output.weight", "IQ2_XS", (1, 256), memoryview(bytes(74))))


@pytest.mark.parametrize(("shape", "size"), [((2, 64), 79), ((2, 64), 60), ((4, 16), 40), ((2, 48), 60)])
def test_torn_tensors_are_refused(shape: tuple[int, int], size: int) -> None:
    with pytest.raises(ModelFileError, match="x is broken"):
        load_matrix(Tensor("x", "Q4_1", shape, memoryview(bytes(size))))
