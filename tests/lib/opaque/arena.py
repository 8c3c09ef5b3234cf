"""An arena whose leases hide what they hold."""

from typing import Any

from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.lease import ArenaLease, HostLease
from meshd.kernels.kv.memory import KvKey, Layout, Precision

_FUNCTIONS = frozenset(name for name in vars(ArenaLease) if not name.startswith("_"))


class OpaqueLease:
    """Implements `ArenaLease`, and nothing else."""

    __slots__ = ("_lease",)

    def __init__(self, lease: HostLease) -> None:
        self._lease = lease

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise AttributeError(f"a lease of KV that is elsewhere has no {name!r}")
        return getattr(self._lease, name)

    @classmethod
    def inside(cls, lease: ArenaLease) -> HostLease:
        """Return what an opaque lease hides."""
        assert isinstance(lease, cls), "a lease of another arena"
        return lease._lease


class OpaqueArena:
    """Implements `KvArena` with opaque leases."""

    def __init__(self, budget_bytes: int) -> None:
        self._arena = HostArena(budget_bytes)

    @property
    def budget_bytes(self) -> int:
        return self._arena.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._arena.reserved_bytes

    @property
    def used_bytes(self) -> int:
        return self._arena.used_bytes

    def open(
        self,
        key: KvKey,
        layout: Layout,
        capacity: int,
        *,
        step_tokens: int | None = None,
        precision: Precision = Precision.FP32,
    ) -> OpaqueLease:
        return OpaqueLease(self._arena.open(key, layout, capacity, step_tokens=step_tokens, precision=precision))
