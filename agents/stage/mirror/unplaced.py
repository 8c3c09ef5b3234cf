"""KV of layers that this peer does not have in memory: it keeps a copy for a peer that has them, or until it loads them itself."""

from collections.abc import Callable
from dataclasses import dataclass

from meshd.errors import NoPeer, OutOfMemory
from meshd.kernels.kv.arena import KvArena
from meshd.kernels.kv.lease import ArenaLease
from meshd.kernels.kv.memory import KvKey, Precision, layout_of, reserved_bytes
from meshd.kernels.kv.share import STEP_TOKENS
from meshd.types import LayerRange, ModelId, ModelSpec


@dataclass(frozen=True, slots=True)
class UnplacedKv:
    """Opens leases on memory that no placement reserves."""

    arena: KvArena
    spec_of: Callable[[ModelId], ModelSpec | None]
    """Returns the spec of a model that is known in the cluster."""
    spare_bytes: Callable[[], int]
    """Returns the bytes that may still be reserved on this peer."""

    def open(self, model: ModelId, layers: LayerRange, tokens: int) -> ArenaLease:
        """Open a lease for a copy.

        Raises: NoPeer if nobody knows the model, or it has no such layers; OutOfMemory if other reservations take the memory.
        """
        spec = self.spec_of(model)
        if spec is None or layers not in LayerRange(0, spec.layers):
            raise NoPeer(f"this peer knows no model {model:.8} with layers {layers}", hint="place them first")
        layout = layout_of(spec, layers)
        needed, spare = reserved_bytes(layout, Precision.FP32, tokens, STEP_TOKENS), self.spare_bytes()
        if needed > spare:
            raise OutOfMemory(f"no KV for {tokens} tokens of a copy: {needed} bytes needed, {max(0, spare)} free")
        return self.arena.open(KvKey(model, layers), layout, tokens, step_tokens=STEP_TOKENS)
