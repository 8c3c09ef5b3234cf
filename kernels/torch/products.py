"""Products of the torch backend: weights as stored, widened to float32 a block of rows at a time, on any of torch's devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meshd.kernels.attention import to_tensor
from meshd.kernels.backend import F32
from meshd.kernels.threads import Workers
from meshd.kernels.weights.layers import Projection
from meshd.kernels.weights.load import BlockMatrix, DenseMatrix

ROWS = 512
"""Rows dequantised at a time: a block of them stays in the cache (256 to 512 measured best)."""
PARALLEL_WORK = 16 << 20
"""Multiplications: below this, a hand-over to a second thread costs more than it saves."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""`[tokens, columns]` to `[tokens, rows]`."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors lie and what computes on them: this code is the same for the CPU, CUDA and Apple's MPS."""

    name: str
    """torch's: `cpu`, `cuda` or `mps`."""
    workers: Workers
    """Threads of the CPU; another device needs none."""

    def hold(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Weights, of whatever type; on the CPU a view."""
        return torch.from_numpy(array).to(self.name)

    def take(self, array: F32) -> torch.Tensor:
        """Activations from the interface."""
        return to_tensor(array).to(self.name)

    def give(self, tensor: torch.Tensor) -> F32:
        """Activations to the interface."""
        return tensor.contiguous().cpu().numpy()

    def rows_at_once(self) -> int:
        return ROWS if self.name == "cpu" else ROWS * 16

    def share(self, part: Callable[[int], torch.Tensor], rows: int, work: int) -> torch.Tensor:
        """A product of so many rows from its parts; by several threads if there is enough to do."""
        starts = range(0, rows, self.rows_at_once())
        parallel = self.name == "cpu" and work >= PARALLEL_WORK
        return torch.cat(self.workers.map(part, starts) if parallel else [part(start) for start in starts], dim=1)


class BlockProduct:
    """`x @ w.T` with quantised w, as `x @ (scale * code).T + blocksum(x) @ (shift - scale * zero).T`.

    The columns of a block of nibbles stand even ones first, as they come out of their bytes; x is put in that order.
    """

    def __init__(self, matrix: BlockMatrix, device: Device) -> None:
        self._device = device
        self._columns = matrix.shape[1]
        self._bits, self._block = matrix.bits, matrix.block
        shift = matrix.shift
        if matrix.bits == 4:
            shift = (0 if shift is None else shift) - matrix.scale * matrix.zero
        codes = matrix.codes if matrix.bits == 4 else (matrix.codes ^ 0x80).view(np.int8)  # 8 bits become signed, zero 0
        self._codes = device.hold(codes)  # [rows, blocks, block * bits / 8]
        self._scale = device.hold(matrix.scale).unsqueeze(-1)  # [rows, blocks, 1]
        self._shift = None if shift is None else device.hold(shift)  # [rows, blocks]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.view(len(x), -1, self._block)
        sums = blocks.sum(2)
        if self._bits == 4:
            blocks = torch.cat([blocks[..., 0::2], blocks[..., 1::2]], dim=-1)
        ordered = blocks.reshape(x.shape)

        def part(first: int) -> torch.Tensor:
            rows = slice(first, first + self._device.rows_at_once())
            y = ordered @ self._dequantise(rows).T
            return y if self._shift is None else y.addmm_(sums, self._shift[rows].T)

        return self._device.share(part, len(self._codes), x.numel() * len(self._codes))

    def _dequantise(self, rows: slice) -> torch.Tensor:
        """`scale * code` of some rows: `[rows, columns]`, columns in the product's order."""
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
    """`x @ w.T` with w as stored, widened a block of rows at a time."""

    def __init__(self, matrix: DenseMatrix, device: Device) -> None:
        self._device = device
        values = torch.from_numpy(matrix.values.copy())
        self._values = (values.view(torch.bfloat16) if matrix.values.dtype == np.uint16 else values).to(device.name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        def part(first: int) -> torch.Tensor:
            return x @ self._values[first : first + self._device.rows_at_once()].to(x.dtype).T

        return self._device.share(part, len(self._values), x.numel() * len(self._values))


def make_product(linear: Projection, device: Device) -> Product:
    """The product with matrices laid end to end, and its bias."""
    products: list[Product] = [
        BlockProduct(m, device) if isinstance(m, BlockMatrix) else DenseProduct(m, device) for m in linear.matrices
    ]
    if len(products) == 1 and linear.bias is None:
        return products[0]
    bias = 0 if linear.bias is None else device.hold(linear.bias)
    return lambda x: torch.cat([product(x) for product in products], dim=1) + bias
