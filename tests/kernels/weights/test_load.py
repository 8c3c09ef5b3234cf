"""Compares weights of every kind with the `gguf` package, and both backends' products with float64."""

import tracemalloc
from collections.abc import Mapping, Sequence

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.errors import ModelFileError
from meshd.kernels.ort.graph import Precision, product_subgraph
from meshd.kernels.ort.session import OrtSession
from meshd.kernels.ort.trials import least_rows, zero_points_work
from meshd.kernels.threads import Workers
from meshd.kernels.torch.products import Device, make_product
from meshd.kernels.weights.kinds import BLOCK_KINDS
from meshd.kernels.weights.layers import Projection
from meshd.kernels.weights.load import (
    KINDS,
    BlockMatrix,
    DenseMatrix,
    Matrix,
    check_finite,
    dequantise,
    dequantise_rows,
    expert_matrix,
    load_matrix,
    load_stacked,
    unpack_codes,
    widen_bf16,
)
from meshd.kernels.weights.matrices import zero_points_and_shifts
from meshd.types import Tensor

ROWS, COLUMNS = 6, 512
FLOATS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
FORM_BITS = {
    "Q4_0": 5, "Q4_1": 6, "Q5_0": 9, "Q5_1": 10, "Q8_0": 9, "Q4_K": 6, "Q5_K": 10, "Q6_K": 10, "IQ4_NL": 9, "MXFP4": 9,
}  # fmt: skip
"""Bits per weight in a `BlockMatrix`, from the table in `kernels/weights/matrices.py`."""
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Offsets of the float16 numbers in a block; (0,) for kinds that are not listed."""


def random_bytes(kind: str, rows: int, *, columns: int = COLUMNS, seed: int = 7, wild: bool = False) -> np.ndarray:
    """Make random bits `[rows, bytes]`.

    `wild`: scales are any finite numbers, also subnormal, huge and zero; otherwise they are about 1.
    """
    rng = np.random.default_rng(seed)
    if kind in FLOATS and wild:
        unsigned, infinity = FLOATS[kind]
        bits = rng.integers(0, 1 << (8 * unsigned().itemsize), (rows, columns), unsigned)
        bits[(bits & infinity) == infinity] = 0
        return bits.view(np.uint8)
    if kind in FLOATS:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])).view(np.uint8)
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * columns // weights, size), np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(0, 253, len(blocks)) if wild else rng.integers(125, 130, len(blocks))
    else:
        for at in HALVES.get(kind, (0,)):
            halves = rng.standard_normal(len(blocks)).astype(np.float16)
            if wild:
                halves = rng.integers(0, 1 << 16, len(blocks), np.uint16).view(np.float16)
                halves[~np.isfinite(halves)] = 0
            blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def tensor_of(kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return Tensor(f"{kind}.weight", kind, shape, memoryview(raw.tobytes()))


def random_tensor(kind: str, rows: int = ROWS, **options: object) -> tuple[Tensor, np.ndarray]:
    """Make a random tensor. Returns: the tensor, and its values as dequantised by the `gguf` package."""
    raw = random_bytes(kind, rows, **options)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(rows, -1)
    return tensor_of(kind, raw, values.shape), values


def values_of(matrix: Matrix) -> np.ndarray:
    """Compute a matrix's weights in float64, in which its sums and products are exact or almost exact."""
    if isinstance(matrix, DenseMatrix):
        return (widen_bf16(matrix.values) if matrix.values.dtype == np.uint16 else matrix.values).astype(np.float64)
    codes = unpack_codes(matrix).astype(np.float64).reshape(*matrix.scale.shape, matrix.block)
    weights = matrix.scale[..., None] * (codes - matrix.zero)
    return (weights if matrix.shift is None else weights + matrix.shift[..., None]).reshape(matrix.shape)


def ort_product(matrices: tuple[Matrix, ...], x: np.ndarray, level: int, *, zeros: bool = True) -> np.ndarray:
    """Compute `x @ w.T` with the onnxruntime backend's graph; `level` 4 is int8 activations, 1 is float32."""
    precision = Precision(level, zeros)
    session = OrtSession(product_subgraph(Projection(matrices), precision), 1, least_rows(precision))
    result: np.ndarray = session.run(("y",), {"x": x})[0]
    return result


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_those_of_gguf_bit_for_bit(kind: str, wild: bool) -> None:
    tensor, values = random_tensor(kind, rows=64, wild=wild)
    assert np.array_equal(dequantise(tensor).view(np.uint32), values.view(np.uint32))
    check_finite(tensor)


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 1 << 32))
@settings(max_examples=150, deadline=None)
def test_values_and_rows_of_any_shape_equal_those_of_gguf(kind: str, rows: int, blocks: int, seed: int) -> None:
    tensor, values = random_tensor(kind, rows, columns=256 * blocks, seed=seed, wild=True)
    chosen = np.random.default_rng(seed).integers(0, rows, 4)
    assert np.array_equal(dequantise(tensor).view(np.uint32), values.view(np.uint32))
    assert np.array_equal(dequantise_rows(tensor, chosen).view(np.uint32), values[chosen].view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_several_chunks_is_read_whole(kind: str) -> None:
    tensor, values = random_tensor(kind, rows=1030)
    assert np.array_equal(dequantise(tensor), values)
    np.testing.assert_allclose(values_of(load_matrix(tensor)), values, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loading_a_matrix_rounds_only_the_shift(kind: str, wild: bool) -> None:
    raw = random_bytes(kind, 64, wild=wild)
    tensor = tensor_of(kind, raw, (64, COLUMNS))
    matrix = load_matrix(tensor)
    assert matrix.shape == (64, COLUMNS)
    if not isinstance(matrix, BlockMatrix) or matrix.shift is None:
        assert np.array_equal(values_of(matrix), dequantise(tensor))
        return
    layout = BLOCK_KINDS[kind]
    blocks = raw.reshape(-1, layout.size)
    scale, minimum = layout.scale(blocks)[..., None].astype(np.float64), layout.minimum(blocks)[..., None].astype(np.float64)
    codes = layout.codes(blocks).reshape(*scale.shape[:2], layout.group)
    exact = scale * codes + minimum
    widest = np.maximum(abs(minimum), abs(minimum + (2 * layout.middle - 1) * scale))  # the largest weight that codes express
    assert (abs(values_of(matrix).reshape(exact.shape) - exact) <= 2.0**-24 * widest).all()


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_zero_points_keep_the_weights_and_leave_a_small_shift(kind: str, wild: bool) -> None:
    tensor, values = random_tensor(kind, rows=64, wild=wild)
    matrix = load_matrix(tensor)
    packed, shift = zero_points_and_shifts(matrix)
    zero = packed if matrix.bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    codes = unpack_codes(matrix).astype(np.float64).reshape(*matrix.scale.shape, matrix.block)
    found = matrix.scale[..., None] * (codes - zero[..., None]) + shift[..., None]
    right = values.astype(np.float64).reshape(found.shape)
    widest = abs(matrix.shift) + abs(matrix.scale) * 2 * matrix.zero
    assert (abs(found - right) <= 2.0**-22 * widest[..., None]).all()
    both_sides = (right.min(axis=2) <= 0) & (right.max(axis=2) >= 0)
    assert both_sides.any()
    assert (abs(shift) <= 0.5 * abs(matrix.scale) + 2.0**-22 * widest)[both_sides].all()


@pytest.mark.parametrize(("kind", "zeros"), [(kind, zeros) for kind in KINDS for zeros in (True, False)])
def test_products_of_both_backends_are_right(kind: str, zeros: bool) -> None:
    """`zeros` False: products without zero points, for processors on which zero points do not work."""
    tensor, values = random_tensor(kind, rows=40)
    matrix = load_matrix(tensor)
    x = np.random.default_rng(1).standard_normal((3, COLUMNS), dtype=np.float32)
    right = x.astype(np.float64) @ values.T.astype(np.float64)
    spread = abs(x).astype(np.float64) @ abs(values.T).astype(np.float64)
    slack = 1e-5 * spread
    assert (abs(make_product(Projection((matrix,)), Device("cpu", Workers(1)))(torch.from_numpy(x)).numpy() - right) <= slack).all()
    assert (abs(ort_product((matrix,), x, 1, zeros=zeros) - right) <= slack).all()
    if isinstance(matrix, BlockMatrix):
        rounded = ort_product((matrix,), x, 4, zeros=zeros)
        shift = matrix.shift if matrix.shift is None or not zeros else zero_points_and_shifts(matrix)[1]
        by_column = 0 if shift is None else np.repeat(shift, matrix.block, axis=1)
        groups = abs(x).reshape(3, -1, matrix.block).max(axis=2)
        half_step = np.repeat(groups / 127 / 2, matrix.block, axis=1)
        assert (abs(rounded - right) <= half_step @ abs(values - by_column).T * 1.001 + slack).all()
        alone = ort_product((matrix,), x[:1], 4, zeros=zeros)
        assert np.array_equal(rounded[:1], alone), "a token's bits depend on the other tokens"


class OtherProcessor(OrtSession):
    """Imitates onnxruntime on a processor whose kernel for small products gives other values."""

    up_to = 1
    """Rows of the products that are other."""

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        (y,) = super().run(outputs, inputs)
        computed = max(len(y), self._least_rows)
        return [y * np.float32(0.6)] if computed <= self.up_to else [y]


def test_products_that_are_other_for_a_single_row_are_detected_and_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.kernels.ort.trials.OrtSession", OtherProcessor)
    assert least_rows.__wrapped__(Precision(4, zero_points=True)) == 2
    monkeypatch.setattr("meshd.kernels.ort.trials.least_rows", lambda precision: 2)
    assert zero_points_work.__wrapped__()
    monkeypatch.setattr(OtherProcessor, "up_to", 5)
    assert not zero_points_work.__wrapped__()


@pytest.mark.parametrize("level", [1, 4])
def test_a_row_alone_has_the_bits_that_it_has_among_others(level: int) -> None:
    rng = np.random.default_rng(3)
    precision = Precision(level, zero_points_work())
    for kind in ("Q4_0", "Q4_1", "Q4_K", "Q8_0", "Q6_K", "F16", "F32"):
        tensor, _ = random_tensor(kind, rows=300)
        session = OrtSession(product_subgraph(Projection((load_matrix(tensor),)), precision), 2, least_rows(precision))
        x = rng.standard_normal((9, tensor.shape[1]), dtype=np.float32)
        together = session.run(("y",), {"x": x})[0]
        for size in (1, 2, 3):
            parts = [session.run(("y",), {"x": x[at : at + size]})[0] for at in range(0, 9, size)]
            assert np.array_equal(np.concatenate(parts), together), (kind, size)


def test_products_of_matrices_of_different_kinds_are_concatenated() -> None:
    tensors, values = zip(*(random_tensor(kind, rows=5) for kind in ("Q4_K", "IQ4_NL", "F16")), strict=True)
    matrices = load_stacked(tensors)
    assert len(matrices) == 3
    x = np.random.default_rng(1).standard_normal((2, COLUMNS), dtype=np.float32)
    right = x @ np.concatenate(values).T
    product = make_product(Projection(matrices), Device("cpu", Workers(1)))
    np.testing.assert_allclose(product(torch.from_numpy(x)).numpy(), right, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(ort_product(matrices, x, 1), right, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_K"), ("Q8_0", "Q5_0", "IQ4_NL", "MXFP4"), ("Q5_1", "Q5_K"), ("Q6_K", "Q6_K")])
def test_matrices_of_one_form_become_one(kinds: tuple[str, ...]) -> None:
    tensors, values = zip(*(random_tensor(kind, rows=2 + at) for at, kind in enumerate(kinds)), strict=True)
    (loaded,) = load_stacked(tensors)
    np.testing.assert_allclose(values_of(loaded), np.concatenate(values), rtol=1e-5, atol=1e-3)


def test_matrices_of_different_forms_or_widths_stay_separate() -> None:
    tensors = [random_tensor(kind)[0] for kind in ("Q4_1", "Q4_0", "F16")]
    assert len(load_stacked(tensors)) == len(load_stacked(tensors[::-1])) == 3
    assert len(load_stacked([random_tensor("Q4_1")[0], random_tensor("Q4_1", columns=256)[0]])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_a_view_of_its_matrix(kind: str) -> None:
    raw = random_bytes(kind, 12)
    tensor = tensor_of(kind, raw, (3, 4, COLUMNS))
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(tensor.shape)
    second = expert_matrix(tensor, 1)
    assert second.data.obj is tensor.data.obj
    assert second.name == f"{kind}.weight[1]"
    assert np.array_equal(dequantise(second), values[1])
    assert load_matrix(second).shape == (4, COLUMNS)
    assert np.array_equal(dequantise(tensor), values)


@pytest.mark.parametrize(
    ("shape", "size", "index"), [((3, 4, 32), 240, 3), ((3, 4, 32), 240, -1), ((12, 32), 240, 0), ((3, 4, 32), 239, 0)]
)
def test_a_missing_expert_is_refused(shape: tuple[int, ...], size: int, index: int) -> None:
    with pytest.raises(ModelFileError, match="tensor x "):
        expert_matrix(Tensor("x", "Q4_1", shape, memoryview(bytes(size))), index)


@pytest.mark.parametrize("read", [dequantise, load_matrix, check_finite, lambda tensor: dequantise_rows(tensor, np.array([5]))])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_names_the_tensor_with_weights_that_are_not_finite(kind: str, bad: float, read: object) -> None:
    raw = random_bytes(kind, ROWS).copy()
    for at in HALVES.get(kind, (0,)):
        broken = raw.copy()
        last = broken[-1].reshape(-1, BLOCK_KINDS[kind].size)[-1] if kind in BLOCK_KINDS else broken[-1]
        if kind == "MXFP4":
            last[0] = 255 if np.isnan(bad) else 253
        elif kind in FLOATS:
            value = gguf.quants.quantize(np.full((1, 1), bad, np.float32), gguf.GGMLQuantizationType[kind]).view(np.uint8)
            last[-value.size :] = value[0]
        else:
            last[at : at + 2] = np.array([bad], np.float16).view(np.uint8)
        with pytest.raises(ModelFileError, match=rf"tensor {kind}\.weight can't be computed with: some of its weights are NaN"):
            read(tensor_of(kind, broken, (ROWS, COLUMNS)))  # type: ignore[operator]
        read(tensor_of(kind, raw, (ROWS, COLUMNS)))  # type: ignore[operator]


@pytest.mark.parametrize("read", [dequantise, load_matrix, check_finite, lambda tensor: dequantise_rows(tensor, np.array([0]))])
def test_the_error_for_an_unknown_kind_lists_the_known_kinds(read: object) -> None:
    with pytest.raises(ModelFileError, match=r"output\.weight .* IQ2_XS .* F32, F16, BF16, Q4_0, .*, MXFP4"):
        read(Tensor("output.weight", "IQ2_XS", (1, 256), memoryview(bytes(74))))  # type: ignore[operator]


@pytest.mark.parametrize("read", [dequantise, load_matrix, check_finite, lambda tensor: dequantise_rows(tensor, np.array([0]))])
@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        ("Q4_1", (2, 64), 79),
        ("Q4_1", (2, 64), 60),
        ("Q4_1", (4, 16), 40),
        ("Q4_1", (2, 48), 60),
        ("Q4_1", (0, 32), 0),
        ("Q4_K", (2, 128), 144),
        ("F32", (2, 3), 23),
        ("BF16", (2, 3), 24),
        ("F16", (0, 3), 0),
    ],
)
def test_tensors_of_the_wrong_size_are_refused(kind: str, shape: tuple[int, int], size: int, read: object) -> None:
    with pytest.raises(ModelFileError, match="x is broken"):
        read(Tensor("x", kind, shape, memoryview(bytes(size))))  # type: ignore[operator]


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_copied_only_if_they_are_not_aligned(kind: str) -> None:
    tensor, values = random_tensor(kind)
    matrix = load_matrix(tensor)
    assert isinstance(matrix, DenseMatrix)
    assert np.shares_memory(matrix.values, np.frombuffer(tensor.data, np.uint8))
    unaligned = Tensor("x", kind, (ROWS, COLUMNS), memoryview(b"-" + bytes(tensor.data))[1:])
    copied = load_matrix(unaligned)
    assert isinstance(copied, DenseMatrix)
    assert copied.values.flags.aligned
    assert dequantise(unaligned).flags.aligned
    assert np.array_equal(values_of(copied), values)
    assert np.array_equal(dequantise(unaligned), values)
    assert np.array_equal(dequantise_rows(unaligned, np.array([2])), values[[2]])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_1", "Q6_K", "MXFP4"])
def test_loading_takes_little_memory_beside_its_result(kind: str) -> None:
    raw = np.tile(random_bytes(kind, 32, columns=4096), (256, 1))
    tensor = tensor_of(kind, raw, (32 * 256, 4096))
    del raw
    half = Tensor(tensor.name, kind, (tensor.shape[0] // 2, 4096), tensor.data[: len(tensor.data) // 2])
    for tensors in ([tensor], [half, half]):
        tracemalloc.start()
        try:
            (matrix,) = load_stacked(tensors)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert matrix.bytes == tensor.shape[0] * tensor.shape[1] * FORM_BITS[kind] // 8
        assert peak <= matrix.bytes + (4 << 20)
