"""The layers that this peer has in memory, with their KV pools and measured times, and the events of their changes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from meshd.agents.observe.events import HoldingChanged, LoadProgress
from meshd.agents.observe.stream import EventStream
from meshd.kernels.backend import LoadedLayers
from meshd.kernels.kv import KVPool
from meshd.types import Holding, LayerRange, ModelCard, ModelId

_STEP = 0.02
"""Progress of a load between two events."""


class LoadState(Enum):
    """The state of a run of layers. It never goes back to an earlier state.

    WARM: the weights are read, and the check step (`warmup.py`) runs. DRAINING: running sessions finish, but none starts.
    """

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
    """While loading, an estimate from the model's card; afterwards that or the size that the backend reports, if it is larger."""
    state: LoadState = LoadState.LOADING
    progress: float = 0.0
    weights: LoadedLayers | None = None
    pool: KVPool | None = None
    has_room: bool = True
    """Whether the memory for these layers was made free. False while their weights are fetched: nothing was released yet."""
    sessions: int = 0
    standby: bool = False
    """Whether this copy serves only when another peer with these layers is lost. A standby copy is the first to be released."""
    pinned: bool = False
    """Whether the user asked for certain peers, stages or an objective, so that the keeper does not move these layers."""
    restored: bool = False
    """Whether this peer loaded these layers unasked after a restart, and no PLACE has asked for them since."""
    layer_decode_s: float | None = None
    """Measured by the check step, like the four below. Real steps correct them for the whole peer (`stage/learning.py`)."""
    layer_prefill_s: float | None = None
    head_s: float | None = None
    attention_token_s: float | None = None
    attention_pair_s: float | None = None
    steady: bool = True
    """Whether a token's output has the same bits alone as in a batch. If not, a recovery that recomputes it can alter an answer."""

    @property
    def reserved_bytes(self) -> int:
        """Bytes of weights and KV, including KV blocks that are not used yet."""
        return self.weight_bytes + self.kv_tokens * self.card.kv_bytes_per_token_layer() * len(self.layers)

    @property
    def in_use(self) -> bool:
        """Whether a session uses these layers or has KV in their pool."""
        return self.sessions > 0 or (self.pool is not None and self.pool.blocks_free < self.pool.blocks)

    @property
    def gives_way(self) -> bool:
        """Whether this is a standby copy that no session uses, and so may be released to make room."""
        return self.standby and self.state is LoadState.ACTIVE and not self.in_use

    @property
    def untouched_bytes(self) -> int:
        """Bytes that are reserved but not yet allocated: KV blocks never written to; everything until there is a pool.

        A block that a session has freed is allocated: the system does not get its memory back.
        """
        return self.reserved_bytes if self.pool is None else self.pool.bytes_untouched

    def holding(self) -> Holding:
        """Describe these layers for the advert."""
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
            attention_token_s=self.attention_token_s,
            attention_pair_s=self.attention_pair_s,
            standby=self.standby,
            pinned=self.pinned,
            restored=self.restored,
        )


@dataclass(slots=True)
class ResidentModels:
    """All resident layers of this peer. Only the loader adds and removes entries; the stage host finds them and counts sessions."""

    entries: list[ResidentLayers] = field(default_factory=list)

    def __iter__(self) -> Iterator[ResidentLayers]:
        return iter(self.entries)

    def find(self, model: ModelId, layers: LayerRange) -> ResidentLayers | None:
        """Find the active entry that contains these layers, the one with the most free KV. Returns: None if there is none."""
        fitting = [
            resident
            for resident in self.entries
            if resident.card.id == model and layers in resident.layers and resident.state is LoadState.ACTIVE
        ]
        return max(fitting, key=lambda resident: resident.pool.blocks_free if resident.pool is not None else 0, default=None)

    def of(self, model: ModelId) -> list[ResidentLayers]:
        return [resident for resident in self.entries if resident.card.id == model]

    @property
    def reserved_bytes(self) -> int:
        return sum(resident.reserved_bytes for resident in self.entries if resident.state is not LoadState.FAILED)

    @property
    def untouched_bytes(self) -> int:
        """Bytes that are reserved but not yet allocated from the system."""
        return sum(resident.untouched_bytes for resident in self.entries)


@dataclass(slots=True)
class HoldingChanges:
    """Compares the layers on this peer with those of the last call."""

    holdings: ResidentModels
    events: EventStream
    _known: dict[int, tuple[ResidentLayers, LoadState, float]] = field(default_factory=dict)
    """Layers by `id()`, with the state and the progress that were published."""

    def changed(self) -> None:
        """Publish what has changed. Called after each change, and several times a second while layers load."""
        present = {id(resident): resident for resident in self.holdings}
        for number, (resident, was, _) in list(self._known.items()):
            if number not in present:
                del self._known[number]
                self._publish(resident, "released", was.value)
        for number, resident in present.items():
            known = self._known.get(number)
            progress = known[2] if known is not None else 0.0
            if known is None or known[1] is not resident.state:
                self._publish(resident, resident.state.value, known[1].value if known is not None else "")
            elif resident.state is LoadState.LOADING and resident.progress - progress < _STEP:
                continue
            elif resident.state is LoadState.LOADING:
                layers = str(resident.layers)
                self.events.publish(LoadProgress(model=resident.card.name, layers=layers, progress=resident.progress))
            self._known[number] = resident, resident.state, resident.progress

    def _publish(self, resident: ResidentLayers, state: str, was: str) -> None:
        self.events.publish(HoldingChanged(model=resident.card.name, layers=str(resident.layers), state=state, was=was))
