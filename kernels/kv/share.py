"""The share of an arena that a placement reserves for the sessions of its layers."""

import threading
from collections import Counter
from collections.abc import Iterable

from meshd.errors import OutOfMemory
from meshd.kernels.kv.arena import KvArena
from meshd.kernels.kv.lease import ArenaLease
from meshd.kernels.kv.memory import PAGE_TOKENS, KvKey, Precision, layout_of, reserved_bytes
from meshd.types import LayerRange, ModelId, ModelSpec

STEP_TOKENS = 256
"""Least number of tokens that a step may have: two prefill chunks of the planner, and as many as a chunk of a copy may have."""


class KvShare:
    """KV for `tokens` tokens of a model's layers, in an arena. Its memory is counted here, used or not, and nowhere else."""

    def __init__(self, arena: KvArena, model: ModelId, spec: ModelSpec, layers: LayerRange, tokens: int) -> None:
        self.tokens = tokens
        self.layers = layers
        self._arena = arena
        self._model = model
        self._spec = spec
        layout = layout_of(spec, layers)
        self._layout = Counter(layout)
        self.bytes = sum(memory.row_values for memory in layout) * Precision.FP32.value_bytes * tokens
        self._leases: list[ArenaLease] = []
        self._free = 0, tokens
        """`leased_bytes` at the last look at `tokens_free`, and what it was."""
        self._lock = threading.Lock()

    @property
    def leases(self) -> list[ArenaLease]:
        """The open leases on this share. Reading them changes nothing: the loop does so while the compute thread opens one."""
        return [lease for lease in self._leases.copy() if lease.is_open]

    @property
    def leased_bytes(self) -> int:
        return sum(lease.reserved_bytes for lease in self.leases)

    @property
    def tokens_free(self) -> int:
        """Number of tokens, in whole pages, that one more session over all layers can have.

        A share with a lease never shows all of its tokens, though a window may leave room for them: the planner takes a share with
        all tokens free for an unused one.
        """
        leased = self.leased_bytes
        if leased != self._free[0]:
            self._free = leased, self._tokens_beside(leased)
        return self._free[1]

    def _tokens_beside(self, leased: int) -> int:
        """Compute `tokens_free` beside leases of `leased` bytes."""
        if not leased:
            return self.tokens
        free, low, high = self.bytes - leased, 0, max(0, self.tokens // PAGE_TOKENS - 1)
        while low < high:
            pages = (low + high + 1) // 2
            fits = reserved_bytes(self._layout, Precision.FP32, pages * PAGE_TOKENS, STEP_TOKENS) <= free
            low, high = (pages, high) if fits else (low, pages - 1)
        return low * PAGE_TOKENS

    def open(self, layers: LayerRange, capacity: int, *, step_tokens: int = STEP_TOKENS) -> ArenaLease:
        """Open a lease for some of the layers. Raises: OutOfMemory if the share has too little left, as `KvArena.open` does."""
        layout = layout_of(self._spec, layers)
        needed = reserved_bytes(layout, Precision.FP32, max(capacity, 1), min(step_tokens, max(capacity, 1)))
        with self._lock:
            left = self.bytes - self.leased_bytes
            if needed > left:
                raise OutOfMemory(
                    f"no KV for {capacity} tokens: {needed} bytes needed, {left} of {self.bytes} free",
                    hint="wait for a session to end, or ask for a shorter context",
                )
            lease = self._arena.open(KvKey(self._model, layers), layout, capacity, step_tokens=step_tokens)
            self._leases = [*self.leases, lease]
        return lease


def leased_outside(arena: KvArena, shares: Iterable[KvShare]) -> int:
    """Bytes of leases that are on no share: copies that this peer keeps for others."""
    return arena.reserved_bytes - sum(share.leased_bytes for share in shares)
