"""Virtual memory of one lease: address space at once, memory as it is written, given back at once."""

import mmap
import sys

import numpy as np
import numpy.typing as npt

from meshd.errors import OutOfMemory

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python names from 3.13 on: leases count their bytes themselves, and address space is not memory."""


class Region:
    """A private anonymous mapping. Its arrays are zero until they are written."""

    def __init__(self, size: int) -> None:
        """Raises: OutOfMemory if the system refuses the address space."""
        self._size = self.aligned(max(size, 1))
        try:
            self._mapping = self._map()
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemory(f"no room for {size} bytes of KV: {error}", hint="lower the context or --memory") from error

    @staticmethod
    def aligned(size: int) -> int:
        """Round up to whole system pages."""
        return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE

    def _map(self) -> mmap.mmap:
        if sys.platform == "win32":
            return mmap.mmap(-1, self._size)
        mapping = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        if sys.platform == "linux":
            mapping.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would commit 2 MiB per layer for the first token
        return mapping

    def array(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """View a part of the region as an array. The view keeps the address space."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._mapping, dtype, count=count, offset=offset).reshape(shape)

    def give_back(self, start: int, end: int) -> None:
        """Give the memory of the bytes `[start, end)` back to the system, in whole system pages. They read as zero afterwards."""
        first, last = self.aligned(start), end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and sys.platform != "win32":
            self._mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Give everything back to the system. Arrays read as zero from now on; the last one frees the address space."""
        self.give_back(0, self._size)
