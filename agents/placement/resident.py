"""The layers that this peer has in memory, with their shares of KV and measured times, and the events of their changes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from meshd.agents.observe.events import HoldingChanged, LoadProgress
from meshd.agents.observe.stream import EventStream
from meshd.errors import NoPeer
from meshd.kernels.backend import LoadedLayers, Stage
from meshd.kernels.kv.arena import KvArena
from meshd.kernels.kv.share import KvShare, leased_outside
from meshd.numerics import UNKNOWN, NumericsId
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
class StageTable:
    """The stages over some resident layers, which sessions share, and the memory that they take beside the layers."""

    made: dict[LayerRange, Stage] = field(default_factory=dict)
    users: Counter[LayerRange] = field(default_factory=Counter)
    """Number of sessions that use a stage, or wait for it."""
    border_bytes: int = 0
    """Bytes of weights that only the stages in `made` need."""
    reading_bytes: int = 0
    """Bytes of further weights that are being read."""

    def enter(self, layers: LayerRange) -> None:
        """Add a user of the stage over `layers`."""
        self.users[layers] += 1

    def leave(self, layers: LayerRange) -> None:
        """Remove a user of the stage over `layers`."""
        self.users[layers] -= 1
        if not self.users[layers]:
            del self.users[layers]

    @property
    def unused(self) -> list[LayerRange]:
        """The layers of stages that no session uses."""
        return [layers for layers in self.made if not self.users[layers]]


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
    kv: KvShare | None = None
    """None until the weights are read."""
    stages: StageTable = field(default_factory=StageTable)
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
    """Measured by the check step, like the four below. Real steps correct them for the whole peer (`stage/batch/learning.py`)."""
    layer_prefill_s: float | None = None
    head_s: float | None = None
    attention_token_s: float | None = None
    attention_pair_s: float | None = None
    steady: bool = True
    """Whether a token's output has the same bits alone as in a batch. If not, a recovery that recomputes it can alter an answer."""

    @property
    def reserved_bytes(self) -> int:
        """Bytes of weights, of stages over parts of the layers, and of KV, including KV that is not used yet."""
        kv_bytes = self.kv_tokens * self.card.kv_bytes_per_token_layer() * len(self.layers)
        return self.weight_bytes + self.stages.border_bytes + self.stages.reading_bytes + kv_bytes

    @property
    def in_use(self) -> bool:
        """Whether a session uses these layers or has KV on their share."""
        return self.sessions > 0 or (self.kv is not None and bool(self.kv.leases))

    @property
    def gives_way(self) -> bool:
        """Whether this is a standby copy that no session uses, and so may be released to make room."""
        return self.standby and self.state is LoadState.ACTIVE and not self.in_use

    @property
    def idle_stage_bytes(self) -> int:
        """Bytes of weights that only stages need which no session uses."""
        if self.weights is None or not self.stages.border_bytes:
            return 0
        return self.stages.border_bytes - self.weights.border_bytes(set(self.stages.made).difference(self.stages.unused))

    @property
    def kv_tokens_free(self) -> int:
        """Tokens that one more session can have KV for; 0 until the weights are read."""
        return self.kv.tokens_free if self.kv is not None else 0

    def holding(self) -> Holding:
        """Describe these layers for the advert."""
        return Holding(
            model=self.card.id,
            layers=self.layers,
            state=self.state.value,
            progress=self.progress,
            weight_bytes=self.weight_bytes,
            kv_tokens_total=self.kv_tokens,
            kv_tokens_free=self.kv_tokens_free,
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
    """All resident layers of this peer, and the arena with the KV of all sessions.

    Only the loader adds and removes entries; the stage host finds them and counts sessions.
    """

    arena: KvArena
    entries: list[ResidentLayers] = field(default_factory=list)
    numerics: NumericsId = UNKNOWN
    """How this peer computes all of them."""

    def __iter__(self) -> Iterator[ResidentLayers]:
        return iter(self.entries)

    def find(self, model: ModelId, layers: LayerRange) -> ResidentLayers | None:
        """Find the active entry that contains these layers, the one with the most free KV. Returns: None if there is none."""
        fitting = [
            resident
            for resident in self.entries
            if resident.card.id == model and layers in resident.layers and resident.state is LoadState.ACTIVE
        ]
        return max(fitting, key=lambda resident: resident.kv_tokens_free, default=None)

    def check_numerics(self, expected: NumericsId) -> None:
        """Check that this peer computes as a plan or a placement expects. Raises: NoPeer if not: its sender's data are stale."""
        if expected and expected != self.numerics:
            raise NoPeer(f"this peer computes with the numerics {self.numerics or 'unknown'}, not {expected}")

    def of(self, model: ModelId) -> list[ResidentLayers]:
        return [resident for resident in self.entries if resident.card.id == model]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all entries, and of KV that belongs to no layers on this peer."""
        entries = sum(resident.reserved_bytes for resident in self.entries if resident.state is not LoadState.FAILED)
        return entries + self._outside_bytes

    @property
    def idle_stage_bytes(self) -> int:
        """Bytes of weights that only stages need which no session uses: they are freed when memory is short."""
        return sum(resident.idle_stage_bytes for resident in self.entries)

    @property
    def untouched_bytes(self) -> int:
        """Bytes that are reserved but not yet allocated from the system."""
        unread = sum(resident.reserved_bytes if resident.kv is None else resident.stages.reading_bytes for resident in self.entries)
        return unread + sum(share.bytes for share in self._shares) + self._outside_bytes - self.arena.used_bytes

    @property
    def _shares(self) -> list[KvShare]:
        return [resident.kv for resident in self.entries if resident.kv is not None]

    @property
    def _outside_bytes(self) -> int:
        return leased_outside(self.arena, self._shares)


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
