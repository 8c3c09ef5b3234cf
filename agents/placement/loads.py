"""The loaded layers of each model on this peer, with their KV pool and their measured times."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from meshd.kernels.backend import LoadedLayers
from meshd.kernels.kv import KVPool
from meshd.types import Holding, LayerRange, ModelCard, ModelId

_SMOOTHING = 0.05
"""Weight of one decode step in the running mean: some 20 steps to follow a change."""


class LoadState(Enum):
    """State of a run of layers; it only moves forward."""

    LOADING = "loading"
    WARM = "warm"
    ACTIVE = "active"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True)
class ResidentLayers:
    """One contiguous run of layers in memory."""

    card: ModelCard
    layers: LayerRange
    kv_tokens: int
    weight_bytes: int
    """Planned while loading, then what the backend reports."""
    state: LoadState = LoadState.LOADING
    progress: float = 0.0
    weights: LoadedLayers | None = None
    pool: KVPool | None = None
    sessions: int = 0
    standby: bool = False
    """A spare for the loss of another peer; any load that is not a standby may replace it."""
    pinned: bool = False
    """A user asked for these layers on this peer."""
    layer_decode_s: float | None = None
    layer_prefill_s: float | None = None
    head_s: float | None = None
    steady: bool = True
    """A token has the same bits whichever others are computed with it: an answer goes on after a loss as it would have."""

    @property
    def reserved_bytes(self) -> int:
        """Weights and KV, whether touched yet or not."""
        return self.weight_bytes + self.kv_tokens * self.card.kv_bytes_per_token_layer() * len(self.layers)

    @property
    def in_use(self) -> bool:
        """Whether a session computes on it, or keeps KV in it."""
        return self.sessions > 0 or (self.pool is not None and self.pool.blocks_free < self.pool.blocks)

    @property
    def gives_way(self) -> bool:
        """Whether it is a standby copy that no session uses."""
        return self.standby and self.state is LoadState.ACTIVE and not self.in_use

    @property
    def untouched_bytes(self) -> int:
        """KV that no session has written to yet, and all of a load that has not begun to read."""
        if self.pool is None:
            return self.reserved_bytes
        return self.pool.blocks_free * self.pool.block_tokens * self.card.kv_bytes_per_token_layer() * len(self.layers)

    def observe_decode(self, layers: int, seconds: float) -> None:
        """Fold one measured decode step over `layers` layers, attention and head not counted, into the mean per layer."""
        per_layer = seconds / layers
        known = self.layer_decode_s
        self.layer_decode_s = per_layer if known is None else known + _SMOOTHING * (per_layer - known)

    def holding(self) -> Holding:
        free = self.pool.blocks_free * self.pool.block_tokens if self.pool is not None else 0
        return Holding(
            model=self.card.id,
            layers=self.layers,
            state=self.state.value,
            progress=self.progress,
            weight_bytes=self.weight_bytes,
            kv_tokens_total=self.kv_tokens,
            kv_tokens_free=free,
            layer_decode_s=self.layer_decode_s,
            layer_prefill_s=self.layer_prefill_s,
            head_s=self.head_s,
            standby=self.standby,
            pinned=self.pinned,
        )


@dataclass(slots=True)
class ResidentModels:
    """All loads of this peer. Only `agents.placement` adds and removes; the stage host looks up and counts sessions."""

    attention_bytes_s: float
    """As probed: to tell a step's attention from the rest of its time."""
    loads: list[ResidentLayers] = field(default_factory=list)

    def __iter__(self) -> Iterator[ResidentLayers]:
        return iter(self.loads)

    def find(self, model: ModelId, layers: LayerRange) -> ResidentLayers | None:
        """The active load that can serve these layers: the one with the most free KV."""
        fitting = [
            load for load in self.loads if load.card.id == model and layers in load.layers and load.state is LoadState.ACTIVE
        ]
        return max(fitting, key=lambda load: load.pool.blocks_free if load.pool is not None else 0, default=None)

    def of(self, model: ModelId) -> list[ResidentLayers]:
        return [load for load in self.loads if load.card.id == model]

    def observe_decode(self, load: ResidentLayers, layers: int, position: int, seconds: float) -> None:
        """One decode step over some layers of a load, with `position` tokens of KV to read."""
        kv_bytes = position * load.card.kv_bytes_per_token_layer() * layers
        load.observe_decode(layers, max(0.0, seconds - kv_bytes / self.attention_bytes_s))

    @property
    def reserved_bytes(self) -> int:
        return sum(load.reserved_bytes for load in self.loads if load.state is not LoadState.FAILED)

    @property
    def untouched_bytes(self) -> int:
        """Promised, but not taken from the system yet: what free KV blocks will need."""
        return sum(load.untouched_bytes for load in self.loads)
