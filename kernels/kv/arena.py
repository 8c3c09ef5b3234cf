"""The arena: all KV memory of one peer on one device, counted once.

A backend makes its arena, so that KV is where the compute is. Only the bookkeeping is common; what a lease holds can be opaque.
"""

import threading
from typing import Protocol

from meshd.errors import LocalFault, OutOfMemory
from meshd.kernels.kv.lease import ArenaLease, HostLease
from meshd.kernels.kv.memory import PAGE_TOKENS, KvKey, Layout, Precision, pages


class KvArena(Protocol):
    """Opens leases within a budget of bytes. Without room, `open` and `grow` raise OutOfMemory: no session is preempted."""

    @property
    def budget_bytes(self) -> int: ...

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all open leases."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes that were written and not given back."""
        ...

    def open(
        self,
        key: KvKey,
        layout: Layout,
        capacity: int,
        *,
        step_tokens: int | None = None,
        precision: Precision = Precision.FP32,
    ) -> ArenaLease:
        """Reserve memory for `capacity` positions (at least 1) of the key's layers, all of it or nothing.

        layout: what each of these layers remembers.
        step_tokens: the most positions beyond the committed one that steps write. None: the whole capacity.
        Raises: OutOfMemory; LocalFault for a precision that the arena does not store.
        """
        ...


class HostArena:
    """Implements `KvArena` in host memory. Any thread may open and forget leases."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.leases: set[HostLease] = set()
        """Open leases."""
        self._reserved_bytes = 0
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        return self._reserved_bytes

    @property
    def used_bytes(self) -> int:
        return sum(lease.used_bytes for lease in self.leases.copy())

    def open(
        self,
        key: KvKey,
        layout: Layout,
        capacity: int,
        *,
        step_tokens: int | None = None,
        precision: Precision = Precision.FP32,
    ) -> HostLease:
        """Open a lease, as `KvArena.open` does."""
        if precision is Precision.INT8:
            raise LocalFault("KV can't be stored as int8 yet", hint="use fp32 or fp16")
        if len(layout) != len(key.layers):
            raise LocalFault(f"{len(layout)} layers are described, but the key names {key.layers}")
        capacity = pages(max(capacity, 1)) * PAGE_TOKENS
        bounded = any(memory.kept_tokens for memory in layout)
        steps = min(step_tokens or capacity, capacity) if bounded else capacity
        return HostLease(key, layout, precision, capacity, steps, self._reserve)

    def _reserve(self, lease: HostLease, size: int) -> None:
        """Set the bytes that a lease has. Raises: OutOfMemory, without having changed anything."""
        with self._lock:
            others = self._reserved_bytes - lease.reserved_bytes
            if size > lease.reserved_bytes and others + size > self.budget_bytes:
                raise OutOfMemory(
                    f"no KV for layers {lease.key.layers}: {size} bytes needed, {self.budget_bytes - others} of "
                    f"{self.budget_bytes} free",
                    hint="wait for a session to end, or ask for a shorter context",
                )
            self._reserved_bytes, lease.reserved_bytes = others + size, size
            if size:
                self.leases.add(lease)
            else:
                self.leases.discard(lease)
