"""The weight matrices that both backends compute with.

A quantised matrix stays quantised, in the form of onnxruntime's MatMulNBits: 4- or 8-bit codes in groups of 16 or 32, and for each
group a float32 scale (the only type that the operator takes with float32 activations). In kinds with minima each group also has a
float32 shift, which is multiplied with the sum of the group's activations. Bits per weight in the file and in this form:

| kind | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | Q6_K | IQ4_NL | MXFP4 |
|---|---|---|---|---|---|---|---|---|---|---|
| file | 4.5 | 5 | 5.5 | 6 | 8.5 | 4.5 | 5.5 | 6.56 | 4.5 | 4.25 |
| this form | 5 | 6 | 9 | 10 | 9 | 6 | 10 | 10 | 9 | 9 |

The operator has codes of 2, 4 and 8 bits and no lookup tables. So codes of five and six bits, and the values in the tables of
IQ4_NL and MXFP4, take eight bits.

All weights are exact except for the shift `minimum + middle * scale`, which is rounded to float32. Since the shift is itself a
weight that the group's codes can express, the error is at most 2^-24 of the largest such weight. Matrices in F32, F16 and BF16
are views of the file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.kernels.weights.kinds import F32, U8


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A quantised matrix `[rows, columns]`: `w[n, k] = scale[n, b] * (code[n, k] - zero) + shift[n, b]` with `b = k // block`."""

    bits: int
    """4 or 8."""
    block: int
    codes: U8
    """`[rows, blocks, block * bits / 8]`. A byte holds two 4-bit codes, the even column's in its low half."""
    scale: F32
    """`[rows, blocks]`."""
    shift: F32 | None
    """`[rows, blocks]`. None: all shifts are zero."""

    @property
    def zero(self) -> int:
        """The code of weight zero, without the shift: 8 or 128."""
        return 1 << (self.bits - 1)

    @property
    def shape(self) -> tuple[int, int]:
        rows, blocks = self.scale.shape
        return rows, blocks * self.block

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.shift is None else self.shift.nbytes)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix `[rows, columns]` in F32, F16 or BF16. BF16 is stored as uint16: the upper half of a float32."""

    values: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def bytes(self) -> int:
        return self.values.nbytes


Matrix = BlockMatrix | DenseMatrix


def zero_points_and_shifts(matrix: BlockMatrix) -> tuple[U8, F32]:
    """Turn as much of each group's shift as possible into a zero point, a whole multiple of the scale.

    The integer product then multiplies activations with the weights themselves, not with their distance from the middle of the
    group's range. This makes the error of int8 activations smaller, by a tenth for Q4_1.

    Returns: the zero points, packed as the codes are, and the remaining shifts `[rows, blocks]`. In a group with weights on both
    sides of zero, the remaining shift is at most half a scale.
    """
    assert matrix.shift is not None
    with np.errstate(over="ignore"):  # a shift divided by a scale near zero may overflow
        steps = np.divide(matrix.shift, matrix.scale, out=np.zeros_like(matrix.scale), where=matrix.scale != 0)
    zero = np.clip(np.rint(matrix.zero - steps), 0, 2 * matrix.zero - 1)
    shift = matrix.shift + matrix.scale * (zero - matrix.zero)
    codes = zero.astype(np.uint8)
    if matrix.bits == 4:
        codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(codes), shift


def unpack_codes(matrix: BlockMatrix) -> U8:
    """Unpack a matrix's codes to one byte each. Returns: `[rows, columns]`."""
    if matrix.bits == 8:
        return matrix.codes.reshape(matrix.shape)
    pairs = np.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1)
    return pairs.reshape(matrix.shape)
