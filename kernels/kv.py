"""Paged KV: one pool of blocks per peer and model, for all layers of the model that the peer holds.

A block holds `block_tokens` tokens in every layer of the pool, so a session needs one table for all layers. The pool reserves its
address space at the start; the system commits memory page by page as tokens are written.
"""

import mmap
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault, OutOfMemory
from meshd.types import LayerRange, ModelSpec

F32 = npt.NDArray[np.float32]
BLOCK_TOKENS = 32
"""Tokens in a block. Attention reads whole blocks; a size that is not a multiple of `KEY_STEP` would change the last bits."""


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of one session, in the order of its tokens."""

    id: int
    """Unique within the pool."""
    blocks: tuple[int, ...]
    block_tokens: int
    contiguous: bool
    """Whether the block numbers are consecutive, so that reading needs no copy."""

    @property
    def capacity(self) -> int:
        """Number of tokens that fit into the blocks."""
        return len(self.blocks) * self.block_tokens


class KVPool:
    """K and V of `layers`, each `[block, token, kv_head, head_dim]` float32.

    Any thread may call `allocate` and `free`; only the compute thread may call `write` and `read`. Another thread may call
    `copy_out` and `copy_in` for positions that the running step does not write: positions of other tables, and positions before
    the first one of the step.
    """

    def __init__(self, spec: ModelSpec, layers: LayerRange, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Raises: OutOfMemory if the system refuses the address space."""
        self.layers = layers
        self.blocks = blocks
        self.block_tokens = block_tokens
        shape = (len(layers), 2, blocks * block_tokens, spec.kv_heads, spec.head_dim)
        self.layer_bytes = 4 * 2 * spec.kv_heads * spec.head_dim
        """Bytes of K and V of one token in one layer."""
        self.bytes = 4 * int(np.prod(shape))
        # An anonymous mapping rather than np.empty: numpy asks for huge pages, which commit 2 MiB per layer for the first token.
        try:
            mapping = mmap.mmap(-1, max(self.bytes, 1))
        except (OSError, OverflowError) as error:
            raise OutOfMemory(f"no room for {self.bytes} bytes of KV: {error}", hint="lower the context or --memory") from error
        self._slots: F32 = np.frombuffer(mapping, np.float32, count=self.bytes // 4).reshape(shape)
        self._free = set(range(blocks))
        self._touched: set[int] = set()
        """Blocks that were written to. The system does not get their memory back when they are freed."""
        self._live: dict[int, BlockTable] = {}
        self._next_id = 0
        self._lock = threading.Lock()

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    @property
    def bytes_untouched(self) -> int:
        """Size of the blocks that were never written to: the system has not committed their memory yet."""
        return (self.blocks - len(self._touched)) * self.block_tokens * self.layer_bytes * len(self.layers)

    def allocate(self, tokens: int) -> BlockTable:
        """Allocate blocks for `tokens` tokens (at least 1), contiguous ones if possible.

        Raises: OutOfMemory, without having changed anything.
        """
        count = -(-max(tokens, 1) // self.block_tokens)
        with self._lock:
            if count > len(self._free):
                raise OutOfMemory(
                    f"no KV for {tokens} tokens: {count} blocks needed, {len(self._free)} of {self.blocks} free",
                    hint="wait for a session to end, or ask for a shorter context",
                )
            chosen = _choose(sorted(self._free), count)
            self._free.difference_update(chosen)
            table = BlockTable(self._next_id, chosen, self.block_tokens, chosen[-1] - chosen[0] == count - 1)
            self._next_id += 1
            self._live[table.id] = table
            return table

    def free(self, table: BlockTable) -> int:
        """Free a table's blocks. Idempotent. Returns: the number of blocks freed; 0 for a table that this pool does not have."""
        with self._lock:
            if self._live.get(table.id) is not table:
                return 0
            del self._live[table.id]
            self._free.update(table.blocks)
            return len(table.blocks)

    def write(self, layer: int, table: BlockTable, start: int, k: F32, v: F32) -> None:
        """Store `k` and `v`, each `[tokens, kv_heads, head_dim]`, from position `start` on.

        Raises: LocalFault for a position outside the table, a layer outside the pool, or a value that is not finite. Attention
        reads whole blocks and a mask does not stop NaN, so a stored NaN would spoil the answers of the block's next session.
        """
        end = start + len(k)
        self._check(layer, table, end)
        if not (np.isfinite(k).all() and np.isfinite(v).all()):
            raise LocalFault(f"layer {layer} can't store position {start}: its K or V is not finite", hint="check the model file")
        if layer == self.layers.start:
            self._touch(table, start, end)
        slots = self._slots[layer - self.layers.start]
        where = self._slots_of(table, start, end)
        slots[0, where] = k
        slots[1, where] = v

    def read(self, layer: int, table: BlockTable, tokens: int) -> tuple[F32, F32]:
        """Read K and V of the blocks that hold the first `tokens` positions.

        Returns: K and V, each `[tokens rounded up to whole blocks, kv_heads, head_dim]`: a view if the blocks are contiguous,
        otherwise a copy of the same shape and strides, so that attention has the same bits for any blocks. Slots not yet written
        are finite.
        Raises: LocalFault for a position outside the table or a layer outside the pool.
        """
        self._check(layer, table, tokens)
        slots = self._slots[layer - self.layers.start]
        where = self._slots_of(table, 0, tokens + -tokens % self.block_tokens)
        return slots[0, where], slots[1, where]

    def copy_out(self, layers: LayerRange, table: BlockTable, start: int, end: int) -> F32:
        """Copy the KV of positions `[start, end)`.

        Returns: `[layers, 2, tokens, kv_heads, head_dim]`.
        Raises: LocalFault for a position outside the table or a layer outside the pool.
        """
        self._check_copy(layers, table, start, end)
        first = layers.start - self.layers.start
        where = self._slots_of(table, start, end)
        return np.ascontiguousarray(self._slots[first : first + len(layers), :, where], "<f4")

    def copy_in(self, layers: LayerRange, table: BlockTable, start: int, values: memoryview) -> None:
        """Store a result of `copy_out`, as little-endian bytes, from position `start` on.

        Raises: LocalFault, without having stored anything: for a position outside the table, a layer outside the pool, a size that
        is not a whole number of tokens, or a value that is not finite.
        """
        size = len(layers) * self.layer_bytes
        if not size or not len(values) or len(values) % size:
            raise LocalFault(f"{len(values)} bytes are not whole tokens of KV in layers {layers}: a token has {size}")
        tokens = len(values) // size
        self._check_copy(layers, table, start, start + tokens)
        given = np.frombuffer(values, "<f4").reshape(len(layers), 2, tokens, *self._slots.shape[3:])
        if not np.isfinite(given).all():
            raise LocalFault(f"KV of positions {start} to {start + tokens - 1} is not finite")
        first = layers.start - self.layers.start
        self._touch(table, start, start + tokens)
        self._slots[first : first + len(layers), :, self._slots_of(table, start, start + tokens)] = given

    def _touch(self, table: BlockTable, start: int, end: int) -> None:
        self._touched.update(table.blocks[start // self.block_tokens : -(-end // self.block_tokens)])

    def _check_copy(self, layers: LayerRange, table: BlockTable, start: int, end: int) -> None:
        if not layers or layers not in self.layers:
            raise LocalFault(f"layers {layers} have no KV here: the pool holds {self.layers}")
        if not 0 <= start < end <= table.capacity:
            raise LocalFault(f"positions {start} to {end - 1} are outside their table, which has room for {table.capacity} tokens")

    def _slots_of(self, table: BlockTable, start: int, end: int) -> slice | npt.NDArray[np.int64]:
        """Find the slots of positions `[start, end)`."""
        if table.contiguous:
            first = table.blocks[0] * self.block_tokens
            return slice(first + start, first + end)
        positions = np.arange(start, end)
        blocks = np.asarray(table.blocks)
        return blocks[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens

    def _check(self, layer: int, table: BlockTable, end: int) -> None:
        if layer not in self.layers:
            raise LocalFault(f"layer {layer} has no KV here: the pool holds {self.layers}")
        if end > table.capacity:
            raise LocalFault(f"position {end - 1} is outside its block table: it has room for {table.capacity} tokens")


def _choose(free: list[int], count: int) -> tuple[int, ...]:
    """Choose the first `count` contiguous blocks of the ascending list `free`; if none are contiguous, its first `count` blocks."""
    for first in range(len(free) - count + 1):
        if free[first + count - 1] - free[first] == count - 1:
            return tuple(free[first : first + count])
    return tuple(free[:count])
