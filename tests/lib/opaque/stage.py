"""Layers of a real backend behind opaque handles."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from meshd.errors import MeshdError
from meshd.kernels.backend import F32, AttendCut, Done, Hidden, Ids, LoadedLayers, Pass, Segment, Stage
from meshd.kernels.sampling.sampler import Picked, PickRequest
from meshd.types import LayerRange
from opaque.arena import OpaqueLease


class OpaqueHidden:
    """Hidden states without an array, a buffer or an index."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Hidden) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    @classmethod
    def inside(cls, hidden: Hidden) -> Hidden:
        """Return what a handle hides."""
        assert isinstance(hidden, cls), "hidden states of another backend"
        return hidden._inner


class OpaquePass:
    """Implements `Pass`."""

    def __init__(self, inner: Pass) -> None:
        self._inner = inner
        self.give, self.drop = inner.give, inner.drop

    def run(self) -> AttendCut | Done:
        found = self._inner.run()
        return Done(OpaqueHidden(found.hidden)) if isinstance(found, Done) else found


class OpaqueStage:
    """Implements `Stage`."""

    def __init__(self, inner: Stage) -> None:
        self._inner = inner

    @property
    def layers(self) -> LayerRange:
        return self._inner.layers

    def embed(self, ids: Ids) -> OpaqueHidden:
        return OpaqueHidden(self._inner.embed(ids))

    def decode(self, payload: memoryview, dtype: str, tokens: int) -> OpaqueHidden:
        return OpaqueHidden(self._inner.decode(payload, dtype, tokens))

    def encode(self, hidden: Hidden, dtype: str, start: int, end: int) -> memoryview:
        return self._inner.encode(OpaqueHidden.inside(hidden), dtype, start, end)

    def join(self, parts: Sequence[Hidden]) -> OpaqueHidden:
        return OpaqueHidden(self._inner.join([OpaqueHidden.inside(part) for part in parts]))

    def rows(self, hidden: Hidden, start: int, end: int) -> OpaqueHidden:
        return OpaqueHidden(self._inner.rows(OpaqueHidden.inside(hidden), start, end))

    def is_finite(self, hidden: Hidden, start: int, end: int) -> bool:
        return self._inner.is_finite(OpaqueHidden.inside(hidden), start, end)

    def begin(self, hidden: Hidden, segments: Sequence[Segment]) -> OpaquePass:
        inner = [replace(segment, lease=OpaqueLease.inside(segment.lease)) for segment in segments]
        return OpaquePass(self._inner.begin(OpaqueHidden.inside(hidden), inner))

    def forward(self, hidden: Hidden, segments: Sequence[Segment]) -> OpaqueHidden:
        found = self.begin(hidden, segments).run()
        assert isinstance(found, Done)
        assert isinstance(found.hidden, OpaqueHidden)
        return found.hidden

    def pick(self, hidden: Hidden, requests: Sequence[PickRequest]) -> list[list[Picked] | MeshdError]:
        return self._inner.pick(OpaqueHidden.inside(hidden), requests)

    def logits(self, hidden: Hidden) -> F32:
        return self._inner.logits(OpaqueHidden.inside(hidden))


class OpaqueLoaded:
    """Implements `LoadedLayers`."""

    def __init__(self, inner: LoadedLayers) -> None:
        self._inner = inner

    @property
    def layers(self) -> LayerRange:
        return self._inner.layers

    @property
    def weight_bytes(self) -> int:
        return self._inner.weight_bytes

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        return self._inner.border_bytes(parts)

    def stage(self, layers: LayerRange) -> OpaqueStage:
        return OpaqueStage(self._inner.stage(layers))

    def close(self) -> None:
        self._inner.close()
