"""The form of a weight matrix that both backends compute on.

A quantised matrix stays quantised. Its form is that of onnxruntime's MatMulNBits: 4- or 8-bit codes in groups of 16 or 32 with a
float32 scale each (with float32 activations the operator takes no other), and where the kind has minima a float32 shift for each
group, which acts on the sums of the activations. Bits for a weight, in the file and in this form:

| kind | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | Q6_K | IQ4_NL | MXFP4 |
|---|---|---|---|---|---|---|---|---|---|---|
| file | 4.5 | 5 | 5.5 | 6 | 8.5 | 4.5 | 5.5 | 6.56 | 4.5 | 4.25 |
| here | 5 | 6 | 9 | 10 | 9 | 6 | 10 | 10 | 9 | 9 |

The operator knows codes of 2, 4 and 8 bits and no tables: five and six bits, and the tables of IQ4_NL and MXFP4, take eight.

Every weight is kept exactly but for the shift `minimum + middle * scale`, which float32 rounds: by 2^-24 of the largest weight that
the group's codes can express at most, since the shift itself is one of those weights. F32, F16 and BF16 are views of the file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.kernels.weights.kinds import F32, U8


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """Quantised `[rows, columns]`: `w[n, k] = scale[n, b] * (code[n, k] - zero) + shift[n, b]` with `b = k // block`."""

    bits: int
    """4 or 8."""
    block: int
    codes: U8
    """`[rows, blocks, block * bits / 8]`; 4-bit codes in pairs, the even column in the low half."""
    scale: F32
    """`[rows, blocks]`."""
    shift: F32 | None
    """`[rows, blocks]`; None: all zero."""

    @property
    def zero(self) -> int:
        """The code of a zero weight (without shift): 8 or 128."""
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
    """`[rows, columns]` in full or half precision; BF16 as the upper half of a float32, in uint16."""

    values: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def bytes(self) -> int:
        return self.values.nbytes


Matrix = BlockMatrix | DenseMatrix


def centred(matrix: BlockMatrix) -> tuple[U8, F32]:
    """A code of zero for each group in place of `zero`, packed as the codes are, and the shifts `[rows, blocks]` that then remain.

    They are half a scale at most where a group has weights on both sides of zero. The integer product then works on the weights as
    they are, not on their distances from the middle of their range, so that rounded activations err less: by a tenth for Q4_1.
    """
    assert matrix.shift is not None
    with np.errstate(over="ignore"):  # beside a scale near zero a shift is far
        wanted = np.divide(matrix.shift, matrix.scale, out=np.zeros_like(matrix.scale), where=matrix.scale != 0)
    zero = np.clip(np.rint(matrix.zero - wanted), 0, 2 * matrix.zero - 1)
    shift = matrix.shift + matrix.scale * (zero - matrix.zero)
    codes = zero.astype(np.uint8)
    if matrix.bits == 4:
        codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(codes), shift


def unpack_codes(matrix: BlockMatrix) -> U8:
    """`[rows, columns]`, one code a byte."""
    if matrix.bits == 8:
        return matrix.codes.reshape(matrix.shape)
    pairs = np.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1)
    return pairs.reshape(matrix.shape)
