"""What torch's products give on this processor, found by trial: MKL chooses an algorithm by the shape of a product.

So activations are multiplied in blocks of rows, and a block only has a number of rows for which a trial gave each row the bits that
it has in a full block.
"""

from functools import cache

import torch

from meshd.kernels.threads import limit_torch_threads

BLOCK_ROWS = 64
"""Rows of a full block. In measurements the products of a chunk of 128 rows took 1.01 to 1.13 times as long in blocks of 64 rows as
in one, and 1.15 to 1.40 times in blocks of 32 rows."""
ROW_COUNTS = (1, 2, 4, *range(8, BLOCK_ROWS + 1, 8))
"""Numbers of rows that a block may have, ascending. A block of another number is filled up to the next of them."""


def fill(x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Fill the last block of `x` `[rows, columns]` with copies of the last row, to one of `counts`."""
    used = (len(x) - 1) % BLOCK_ROWS + 1
    missing = next(count for count in counts if count >= used) - used
    return torch.cat([x, x[-1:].expand(missing, -1)]) if missing else x


def multiply(
    x: torch.Tensor, weights: torch.Tensor, sums: torch.Tensor, shift: torch.Tensor | None, block_rows: int = BLOCK_ROWS
) -> torch.Tensor:
    """Compute `x @ weights.T`, plus `sums @ shift.T` if there is a shift, in blocks of rows. Returns: `[rows, outputs]`."""
    result = x.new_empty(len(x), len(weights))
    for start in range(0, len(x), block_rows):
        rows = slice(start, start + block_rows)
        torch.mm(x[rows], weights.T, out=result[rows])
        if shift is not None:
            result[rows].addmm_(sums[rows], shift.T)
    return result


@cache
def exact_counts(columns: int, outputs: int, sums: int) -> tuple[int, ...]:
    """Find which of `ROW_COUNTS` give each row the bits that it has in a full block, for products of this shape.

    `sums` is the number of columns that a shift is multiplied with; 0: there is no shift. Takes 13 ms for 576 columns, 0.26 s for
    14,336, once in a process. With MKL 2024.2 on a processor with AVX2, all numbers but 1 and 2 do.

    Returns: the numbers, ascending; the last one is `BLOCK_ROWS`.
    """
    limit_torch_threads()
    random = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(rows, columns, generator=random) for rows in (BLOCK_ROWS, outputs))
    added, shift = (torch.randn(rows, sums, generator=random) for rows in (BLOCK_ROWS, outputs))

    def trial(first: int, rows: int) -> torch.Tensor:
        part = slice(first, first + rows)
        return multiply(x[part], weights, added[part], shift if sums else None)

    full = trial(0, BLOCK_ROWS)
    return tuple(
        rows
        for rows in ROW_COUNTS
        if all(torch.equal(trial(first, rows), full[first : first + rows]) for first in range(0, BLOCK_ROWS - rows + 1, rows))
    )
