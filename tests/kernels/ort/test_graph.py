import numpy as np
import pytest

from meshd.kernels.ort.graph import ACCURACY_INT8, DENSE_COLUMNS, Precision, product_subgraph
from meshd.kernels.ort.session import OrtSession
from meshd.kernels.weights.layers import Projection
from meshd.kernels.weights.load import widen_bf16
from meshd.kernels.weights.matrices import DenseMatrix


@pytest.mark.parametrize("outputs", [40, 256])
@pytest.mark.parametrize("columns", [96, DENSE_COLUMNS, 320, 1024])
@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_product_with_16_bit_weights_has_the_same_bits_with_any_threads(kind: str, columns: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((outputs, columns), dtype=np.float32)
    values = wide.astype(np.float16) if kind == "F16" else (wide.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    x = rng.standard_normal((64, columns), dtype=np.float32)
    subgraph = product_subgraph(Projection((DenseMatrix(values),)), Precision(ACCURACY_INT8, zero_points=True))
    results = [OrtSession(subgraph, threads).run(("y",), {"x": x})[0] for threads in (1, 2, 3, 8)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    right = x @ (values.astype(np.float32) if kind == "F16" else widen_bf16(values)).T
    np.testing.assert_allclose(results[0], right, rtol=1e-4, atol=1e-4)
