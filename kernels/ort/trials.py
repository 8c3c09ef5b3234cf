"""What onnxruntime's products give on this processor, found by trial: its kernels differ between processors."""

from functools import cache
from itertools import product

import numpy as np

from meshd.kernels.ort.graph import ACCURACY_INT8, Precision, product_subgraph
from meshd.kernels.ort.session import OrtSession
from meshd.kernels.weights.layers import Projection
from meshd.kernels.weights.matrices import BlockMatrix, DenseMatrix, Matrix, unpack_codes

_OUTPUTS, _BLOCKS, _BLOCK = 96, 8, 32
"""Shape of a trial's weights: 96 outputs of 256 inputs, in blocks of 32. Kernels are chosen by the number of rows, not by these."""


def _matrix(bits: int, rng: np.random.Generator) -> BlockMatrix:
    codes = rng.integers(0, 256, (_OUTPUTS, _BLOCKS, _BLOCK * bits // 8), np.uint8)
    shift = rng.random((_OUTPUTS, _BLOCKS), np.float32) - np.float32(0.5)
    return BlockMatrix(bits, _BLOCK, codes, np.full((_OUTPUTS, _BLOCKS), 0.01, np.float32), shift)


@cache
def least_rows(precision: Precision) -> int:
    """Find how many rows a product needs so that each row has the bits that it has among many. Takes about 30 ms.

    With AVX2 alone, onnxruntime sums a single row of a 4-bit product in another order (1.32.0; from 2 rows on all are equal).

    Returns: 1 or 2.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((24, _BLOCKS * _BLOCK), dtype=np.float32)
    dense = DenseMatrix(rng.standard_normal((_OUTPUTS, _BLOCKS * _BLOCK), dtype=np.float32))
    matrices: tuple[Matrix, ...] = (_matrix(4, rng), _matrix(8, rng), dense)
    for matrix, threads in product(matrices, (1, 2)):
        session = OrtSession(product_subgraph(Projection((matrix,)), precision), threads)
        together = session.run(("y",), {"x": x})[0]
        if any((session.run(("y",), {"x": x[at : at + 1]})[0] != together[at]).any() for at in range(len(x))):
            return 2
    return 1


@cache
def zero_points_work() -> bool:
    """Check whether products with zero points are right on this processor. Takes about 10 ms.

    With AVX2 alone, products of a single row are wrong (https://github.com/microsoft/onnxruntime/issues/29853); `least_rows` avoids
    them.
    """
    rng = np.random.default_rng(0)
    precision = Precision(ACCURACY_INT8, zero_points=True)
    for bits in (4, 8):
        matrix = _matrix(bits, rng)
        x = rng.standard_normal((5, _BLOCKS * _BLOCK), dtype=np.float32)
        shifts = np.repeat(matrix.shift, _BLOCK, axis=1) if matrix.shift is not None else 0
        right = x @ ((unpack_codes(matrix).astype(np.float32) - matrix.zero) * np.float32(0.01) + shifts).T
        session = OrtSession(product_subgraph(Projection((matrix,)), precision), 1, least_rows(precision))
        for tokens in (1, 5):
            got = session.run(("y",), {"x": x[:tokens]})[0]
            if np.linalg.norm(got - right[:tokens]) > 0.05 * np.linalg.norm(right[:tokens]):
                return False
    return True
