"""Matrix products of the torch backend, on any of torch's devices.

A product converts its weights to float32 one block of rows at a time. On the CPU it takes its activations in blocks of rows too, so
that the bits of a row do not depend on the others (`trials.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meshd.kernels.attention.kernel import to_tensor
from meshd.kernels.backend import F32
from meshd.kernels.threads import Workers
from meshd.kernels.torch.trials import BLOCK_ROWS, exact_counts, fill, multiply
from meshd.kernels.weights.kinds import BlockKind
from meshd.kernels.weights.layers import Projection
from meshd.kernels.weights.load import BlockMatrix, DenseMatrix

ROWS = 512
"""Rows dequantised at a time on the CPU, so that they stay in the processor's cache. 256 to 512 were fastest in measurements."""
PARALLEL_WORK = 16 << 20
"""Number of multiplications below which a second thread costs more than it saves."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""Maps activations `[tokens, columns]` to `[tokens, rows]`."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device that holds tensors and computes on them: the CPU, CUDA or Apple's MPS."""

    name: str
    """torch's name: `cpu`, `cuda` or `mps`."""
    workers: Workers
    """Threads for products on the CPU; other devices do not use them."""

    def upload(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Move a writeable array, such as weights, to the device. On the CPU the tensor is a view."""
        return torch.from_numpy(array).to(self.name)

    def to_device(self, array: F32) -> torch.Tensor:
        """Move activations to the device."""
        return to_tensor(array).to(self.name)

    def to_host(self, tensor: torch.Tensor) -> F32:
        """Move activations back to the CPU, as a numpy array."""
        return tensor.contiguous().cpu().numpy()

    def rows_at_once(self) -> int:
        return ROWS if self.name == "cpu" else ROWS * 16

    def counts(self, columns: int, outputs: int, sums: int = 0) -> tuple[int, ...]:
        """Return numbers of rows that a block of activations may have; empty: they are not taken in blocks. See `exact_counts`."""
        if self.name != "cpu":
            return ()
        sizes = {min(outputs, ROWS), outputs % ROWS or ROWS}
        found = [exact_counts(columns, size, sums) for size in sizes]
        return tuple(count for count in found[0] if all(count in counts for counts in found))

    def by_rows(self, part: Callable[[int], torch.Tensor], rows: int, work: int) -> torch.Tensor:
        """Compute a product with `rows` rows of weights in parts, on several threads if it is large.

        `part` computes the rows that begin with its argument; `work` is the product's number of multiplications.
        """
        starts = range(0, rows, self.rows_at_once())
        parallel = self.name == "cpu" and work >= PARALLEL_WORK
        return torch.cat(self.workers.map(part, starts) if parallel else [part(start) for start in starts], dim=1)


class BlockProduct:
    """`x @ w.T` with a quantised w, computed as `x @ (scale * code).T + blocksum(x) @ (shift - scale * zero).T`.

    Unpacking 4-bit codes gives the even columns of a block before the odd ones. The columns of x are put in the same order.
    """

    def __init__(self, matrix: BlockMatrix, device: Device) -> None:
        self._device = device
        self._columns = matrix.shape[1]
        self._bits, self._block = matrix.bits, matrix.block
        shift = matrix.shift
        if matrix.bits == 4:
            shift = (0 if shift is None else shift) - matrix.scale * matrix.zero
        # 8-bit codes become signed, so that the code of a zero weight is 0.
        codes = matrix.codes if matrix.bits == 4 else (matrix.codes ^ 0x80).view(np.int8)
        self._codes = device.upload(codes)  # [rows, blocks, block * bits / 8]
        self._scale = device.upload(matrix.scale).unsqueeze(-1)  # [rows, blocks, 1]
        self._shift = None if shift is None else device.upload(shift)  # [rows, blocks]
        rows, blocks = matrix.scale.shape
        self._counts = device.counts(self._columns, rows, 0 if shift is None else blocks)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = len(x)
        x = fill(x, self._counts) if self._counts else x
        blocks = x.view(len(x), -1, self._block)
        sums = blocks.sum(2)
        if self._bits == 4:
            blocks = torch.cat([blocks[..., 0::2], blocks[..., 1::2]], dim=-1)
        ordered = blocks.reshape(x.shape)

        def part(first: int) -> torch.Tensor:
            rows = slice(first, first + self._device.rows_at_once())
            shift = None if self._shift is None else self._shift[rows]
            return multiply(ordered, self._dequantise(rows), sums, shift, BLOCK_ROWS if self._counts else len(ordered))

        return self._device.by_rows(part, len(self._codes), x.numel() * len(self._codes))[:tokens]

    def _dequantise(self, rows: slice) -> torch.Tensor:
        """Compute `scale * code` of some rows. Returns: `[rows, columns]`, even columns of each 4-bit block before the odd ones."""
        codes, scale = self._codes[rows], self._scale[rows]
        if self._bits == 4:
            half = self._block // 2
            weights = scale.new_empty(*codes.shape[:2], self._block)
            weights[..., :half] = codes & 15
            weights[..., half:] = codes >> 4
        else:
            weights = codes.to(scale.dtype)
        return weights.mul_(scale).view(len(codes), self._columns)


class DenseProduct:
    """`x @ w.T` with a w of F32, F16 or BF16, which becomes float32 a block of rows at a time."""

    def __init__(self, matrix: DenseMatrix, device: Device) -> None:
        self._device = device
        values = torch.from_numpy(matrix.values.copy())
        self._values = (values.view(torch.bfloat16) if matrix.values.dtype == np.uint16 else values).to(device.name)
        self._counts = device.counts(matrix.shape[1], matrix.shape[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = len(x)
        filled = fill(x, self._counts) if self._counts else x

        def part(first: int) -> torch.Tensor:
            weights = self._values[first : first + self._device.rows_at_once()].to(x.dtype)
            return multiply(filled, weights, filled, None, BLOCK_ROWS if self._counts else tokens)

        return self._device.by_rows(part, len(self._values), x.numel() * len(self._values))[:tokens]


def bits_of(kind: BlockKind) -> float:
    """Return the bits per weight that a quantised kind takes in a `BlockProduct`. 4-bit codes always have a shift."""
    floats = 2 if kind.minimum is not None or kind.bits == 4 else 1
    return kind.bits + floats * kind.group_bits


def product_bytes(linear: Projection) -> int:
    """Return the bytes that `make_product` takes for a projection."""
    shifts = [m.scale.nbytes for m in linear.matrices if isinstance(m, BlockMatrix) and m.bits == 4 and m.shift is None]
    return linear.bytes + sum(shifts)


def make_product(linear: Projection, device: Device) -> Product:
    """Make the product with a projection: the concatenated results of its matrices, plus its bias."""
    products: list[Product] = [
        BlockProduct(m, device) if isinstance(m, BlockMatrix) else DenseProduct(m, device) for m in linear.matrices
    ]
    if len(products) == 1 and linear.bias is None:
        return products[0]
    bias = 0 if linear.bias is None else device.upload(linear.bias)
    return lambda x: torch.cat([product(x) for product in products], dim=1) + bias
