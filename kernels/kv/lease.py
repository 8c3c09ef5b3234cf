"""A lease: the memory of one session for the layers of one key, in the arena of a host's own memory."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault
from meshd.kernels.kv import copies
from meshd.kernels.kv.memory import PAGE_TOKENS, KvKey, Layout, MemoryKind, Precision, reserved_bytes, reserved_pages
from meshd.kernels.kv.memory import pages as page_count
from meshd.kernels.kv.store import LayerStore, make_stores
from meshd.types import LayerRange

F32 = npt.NDArray[np.float32]
_TYPES: dict[Precision, np.dtype[np.floating]] = {Precision.FP32: np.dtype("<f4"), Precision.FP16: np.dtype("<f2")}


class ArenaLease(Protocol):
    """An arena's promise of memory for one session. Only the backend that made the arena can read what it holds.

    Positions and layers outside the lease raise LocalFault.
    """

    @property
    def key(self) -> KvKey: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def capacity(self) -> int:
        """Number of positions that the lease is for, in whole pages."""
        ...

    @property
    def step_tokens(self) -> int:
        """Most positions that may be written beyond the committed one: layers with a window reserve room for them. Without such
        layers, the capacity."""
        ...

    @property
    def pages(self) -> int:
        """Number of reserved pages, each for 32 tokens of all layers of one kind."""
        ...

    @property
    def reserved_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages and states that were written and not given back."""
        ...

    @property
    def users(self) -> int:
        """Number of calls of `acquire` without a call of `release`."""
        ...

    @property
    def is_open(self) -> bool: ...

    def acquire(self) -> None:
        """Add a user."""
        ...

    def release(self) -> None:
        """Remove a user; the last one forgets the lease."""
        ...

    def forget(self) -> None:
        """Give all memory back to the system and to the arena. Idempotent. No step may compute on the lease any more."""
        ...

    def grow(self, capacity: int) -> None:
        """Extend the lease to `capacity` positions. No step may compute on it meanwhile.

        Raises: OutOfMemory, without having changed anything.
        """
        ...

    def truncate(self, layers: LayerRange, end: int, committed: int) -> None:
        """Forget positions from `end` on; their pages go back to the system, and stay reserved.

        `committed`: positions that may not be taken back. A later epoch begins with 0.
        Raises: LocalFault for an end below `committed`, or one that is not 0 and before `resumable`.
        """
        ...

    def commit(self, layers: LayerRange, position: int) -> None:
        """Give back what no step at or after `position` reads: pages behind a window, states of past borders.

        Must be called on the thread that calls `copy_out`, which would else read a page that is just given back.
        """
        ...

    def resumable(self, layers: LayerRange, end: int) -> tuple[int, int]:
        """Return the first and last position, up to `end`, at which a step can follow; `(0, 0)` if there is none.

        Position 0 is possible at any time: everything is computed again.
        """
        ...

    def token_bytes(self, layers: LayerRange) -> int:
        """Bytes of one token's rows in these layers."""
        ...

    def copy_out(self, layers: LayerRange, start: int, end: int) -> bytes:
        """Copy what the layers hold of positions `[start, end)`, as pages with their kind (SPEC.md, section 10)."""
        ...

    def copy_in(self, layers: LayerRange, start: int, end: int, data: memoryview) -> None:
        """Store a result of `copy_out`. Raises: LocalFault, without having stored anything, if it is not one for these layers."""
        ...


class HostLease:
    """Implements `ArenaLease` in host memory, and gives attention its rows.

    Only the compute thread may call `write`, `read` and the functions of states. Another thread may copy positions that the running
    step does not write.
    """

    def __init__(
        self,
        key: KvKey,
        layout: Layout,
        precision: Precision,
        capacity: int,
        step_tokens: int,
        reserve: Callable[["HostLease", int], None],
    ) -> None:
        """`reserve` tells the arena how many bytes the lease is to have; it raises OutOfMemory if they are not free."""
        self.key = key
        self.layout = layout
        self.precision = precision
        self.capacity = capacity
        self.step_tokens = step_tokens
        self.users = 0
        self.reserved_bytes = 0
        """Set by the arena."""
        self._reserve = reserve
        self._stores: list[LayerStore] = []
        self._occupy(capacity)

    def _occupy(self, capacity: int) -> None:
        self._reserve(self, reserved_bytes(self.layout, self.precision, capacity, self.step_tokens))
        before = reserved_bytes(self.layout, self.precision, self.capacity, self.step_tokens) if self._stores else 0
        try:
            self._stores = make_stores(self.layout, _TYPES[self.precision], capacity, self.step_tokens)
        except BaseException:
            self._reserve(self, before)
            raise

    @property
    def pages(self) -> int:
        kinds = set(self.layout)
        return sum(reserved_pages(memory, self.capacity, self.step_tokens) for memory in kinds)

    @property
    def used_bytes(self) -> int:
        return sum([store.used_bytes for store in self._stores])

    @property
    def is_open(self) -> bool:
        return bool(self._stores)

    def acquire(self) -> None:
        self.users += 1

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            self.forget()

    def forget(self) -> None:
        if self._stores:
            region, self._stores = self._stores[0].region, []
            region.close()
            self._reserve(self, 0)

    def grow(self, capacity: int) -> None:
        capacity = page_count(capacity) * PAGE_TOKENS
        if capacity <= self.capacity:
            return
        old = self._stores
        self._occupy(capacity)
        for new, was in zip(self._stores, old, strict=True):
            new.floor, new.end, new.states = was.floor, was.floor, was.states
            if was.end > was.floor:
                new.write(was.floor, tuple(array[was.floor : was.end] for array in was.arrays))
            was.truncate(0)  # layer by layer, so that never more than one layer is there twice
        self.capacity = capacity

    def truncate(self, layers: LayerRange, end: int, committed: int) -> None:
        if end < committed:
            raise LocalFault(f"position {end} can't be taken back: positions before {committed} are committed")
        stores = self._of(layers)
        if end and any(end < store.resumable for store in stores):
            raise LocalFault(f"nothing can be computed from position {end} on: what it needs was given back")
        for store in stores:
            store.truncate(end)

    def commit(self, layers: LayerRange, position: int) -> None:
        for store in self._of(layers):
            store.commit(position)

    def resumable(self, layers: LayerRange, end: int) -> tuple[int, int]:
        first = max(store.resumable for store in self._of(layers))
        return (first, end) if first <= end else (0, 0)

    def write(self, layer: int, start: int, *rows: npt.NDArray[np.generic]) -> None:
        """Store rows from position `start` on: K and V, each `[tokens, kv_heads, head_dim]`, or what else the layer remembers.

        Raises: LocalFault as `write_rows` does.
        """
        write_rows(layer, [(self, start, len(rows[0]))], *rows)

    def read(self, layer: int, tokens: int) -> tuple[F32, ...]:
        """Read the rows of the pages that hold the first `tokens` positions, as float32.

        Returns: for each kind of row, `[tokens rounded up to whole pages, *shape]`, indexed by position: a view, or a copy if the
        rows are not stored as float32. Rows not yet written, or given back, are finite.
        """
        store = self._store(layer)
        if tokens > self.capacity:
            raise LocalFault(f"position {tokens - 1} is outside its lease: it has room for {self.capacity} tokens")
        return store.read(tokens)

    def end_of(self, layer: int) -> int:
        """Return the position after the last row that was written of a layer."""
        return self._store(layer).end

    def rows(self, layer: int) -> tuple[npt.NDArray[np.generic], ...]:
        """The stored rows of a layer, each `[capacity rounded up to whole pages, *shape]`. Tests damage them."""
        return self._store(layer).arrays

    def set_state(self, layer: int, border: int, state: F32) -> None:
        """Store a recurrent layer's state at a page border. Raises: LocalFault as `LayerStore.set_state` does."""
        self._store(layer).set_state(border, state)

    def state_before(self, layer: int, position: int) -> tuple[int, F32]:
        """Return the newest state at or before `position`, and its border. Raises: LocalFault if none is kept."""
        return self._store(layer).state_before(position)

    def token_bytes(self, layers: LayerRange) -> int:
        return sum(store.memory.row_values for store in self._of(layers)) * self.precision.value_bytes

    def copy_out(self, layers: LayerRange, start: int, end: int) -> bytes:
        self._check_positions(start, end)
        return b"".join(copies.pack(store, start, end) for store in self._of(layers))

    def copy_in(self, layers: LayerRange, start: int, end: int, data: memoryview) -> None:
        self._check_positions(start, end)
        stores = self._of(layers)
        parts = copies.unpack([store.memory for store in stores], _TYPES[self.precision], start, end, data)
        for store, part in zip(stores, parts, strict=True):
            if part.end > part.start:
                store.check_write(part.start, part.end, anew=part.start > store.end)
        for store, part in zip(stores, parts, strict=True):
            copies.store_part(store, part)

    def _check_positions(self, start: int, end: int) -> None:
        if not 0 <= start < end <= self.capacity:
            raise LocalFault(f"positions {start} to {end - 1} are outside their lease, which has room for {self.capacity} tokens")

    def _of(self, layers: LayerRange) -> list[LayerStore]:
        own = self.key.layers
        if layers not in own or not self._stores:
            raise LocalFault(f"layers {layers} have no KV here: {self._described}")
        return self._stores[layers.start - own.start : layers.end - own.start]

    def _store(self, layer: int) -> LayerStore:
        """Find the memory that a layer reads, its own or another layer's. Called twice a layer and step, so without a range."""
        index = layer - self.key.layers.start
        if not 0 <= index < len(self._stores):
            raise LocalFault(f"layer {layer} has no KV here: {self._described}")
        store = self._stores[index]
        return store if store.memory.kind is not MemoryKind.SHARED else self._store(store.memory.layer)

    @property
    def _described(self) -> str:
        return f"the lease holds {self.key.layers}" if self.is_open else "it was given back"


def write_rows(layer: int, places: Sequence[tuple[HostLease, int, int]], *rows: npt.NDArray[np.generic]) -> None:
    """Store the rows of a batch, each array `[tokens of all places, *shape]`. `places`: lease, first position, number of tokens.

    They are checked for all places at once: two calls for each of them took as long as storing them.

    Raises: LocalFault for positions that a lease does not have, or a value that is not finite or too large for a lease's precision.
    Attention reads whole pages and a mask does not stop NaN, so a stored NaN would spoil later answers.
    """
    stores = [lease._store(layer) for lease, _, _ in places]
    for store, (_, start, tokens) in zip(stores, places, strict=True):
        store.check_write(start, start + tokens)
    _check_finite(layer, places[0][1], rows)
    begin = 0
    for store, (lease, start, tokens) in zip(stores, places, strict=True):
        own = tuple([part[begin : begin + tokens] for part in rows])
        begin += tokens
        if lease.precision is not Precision.FP32:
            with np.errstate(over="ignore"):
                own = tuple([part.astype(_TYPES[lease.precision]) for part in own])
            _check_finite(layer, start, own)
        store.write(start, own)


def _check_finite(layer: int, start: int, rows: Sequence[npt.NDArray[np.generic]]) -> None:
    if not all(np.isfinite(part).all() for part in rows):
        raise LocalFault(f"layer {layer} can't store position {start}: its K or V is not finite", hint="check the model file")
