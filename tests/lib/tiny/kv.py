"""Leases of KV for tests that run stages without a peer."""

from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import KvKey, Precision, layout_of
from meshd.types import LayerRange, ModelId, ModelSpec

MODEL = ModelId("fe" * 16)
BUDGET_BYTES = 1 << 32


def make_lease(
    spec: ModelSpec, layers: LayerRange, tokens: int, *, step_tokens: int | None = None, precision: Precision = Precision.FP32
) -> HostLease:
    """Open a lease in an arena of its own."""
    key, layout = KvKey(MODEL, layers), layout_of(spec, layers)
    return HostArena(BUDGET_BYTES).open(key, layout, tokens, step_tokens=step_tokens, precision=precision)
