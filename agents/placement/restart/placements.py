"""The record of what is placed on this peer, kept on disk so that it is placed again after a restart.

Each peer records the layers that it holds, not standby copies. An entry ends when its model is unplaced, or its layers are released
for others. Models that were unplaced are recorded too: a peer that was off when that happened would otherwise load them again.
"""

from collections.abc import Iterable, Mapping
from logging import getLogger

import msgspec

from meshd.errors import MeshdError
from meshd.state import Folder
from meshd.types import Advert, LayerRange, ModelId, PeerId

log = getLogger(__name__)

NAME = "placements.json"
MAX_PLACED = 64
MAX_UNPLACED = 64
"""Limits of the two lists. The oldest entries are dropped first."""


class PlacedLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that were placed on this peer."""

    model: ModelId
    name: str
    ref: str
    layers: LayerRange
    kv_tokens: int
    pinned: bool = False


class _Document(msgspec.Struct, frozen=True):
    placed: list[PlacedLayers] = []
    unplaced: list[ModelId] = []


class Placements:
    """The record. Changes are made in memory, and written by `save`."""

    def __init__(self, folder: Folder) -> None:
        """Read the record. One that can't be read is logged once, and an empty one begun."""
        self._folder = folder
        self._placed: dict[tuple[ModelId, LayerRange], PlacedLayers] = {}
        self._unplaced: dict[ModelId, int] = {}
        self._ends = 0
        self._written = b""
        try:
            data = folder.read(NAME)
            document = msgspec.json.decode(data, type=_Document) if data else _Document()
        except (MeshdError, msgspec.DecodeError) as error:
            log.warning("what was placed here before the restart is not known: %s can't be read: %s", NAME, error)
            return
        self._written = data or b""
        for entry in document.placed[-MAX_PLACED:]:
            self._placed[entry.model, entry.layers] = entry
        self._unplaced = dict.fromkeys(document.unplaced[-MAX_UNPLACED:], 0)

    @property
    def placed(self) -> tuple[PlacedLayers, ...]:
        return tuple(self._placed.values())

    @property
    def unplaced(self) -> Mapping[ModelId, int]:
        """The models that were unplaced and not placed since, each with a number that is new each time it is unplaced."""
        return self._unplaced

    def add(self, entry: PlacedLayers) -> None:
        """Record layers that were placed; they replace those that they contain."""
        for key in [key for key in self._placed if key[0] == entry.model and key[1] in entry.layers]:
            del self._placed[key]
        self._placed[entry.model, entry.layers] = entry
        self._unplaced.pop(entry.model, None)
        while len(self._placed) > MAX_PLACED:
            del self._placed[next(iter(self._placed))]

    def placed_elsewhere(self, model: ModelId) -> None:
        """Record that a model that was unplaced has been placed again on another peer."""
        self._unplaced.pop(model, None)

    def released(self, model: ModelId, layers: LayerRange) -> None:
        """Record that layers are no longer held here, though their model is not unplaced."""
        self._placed.pop((model, layers), None)

    def end(self, model: ModelId) -> None:
        """Record that a model was unplaced."""
        for key in [key for key in self._placed if key[0] == model]:
            del self._placed[key]
        self._unplaced.pop(model, None)
        self._ends += 1
        self._unplaced[model] = self._ends
        while len(self._unplaced) > MAX_UNPLACED:
            del self._unplaced[next(iter(self._unplaced))]

    def save(self) -> None:
        """Write the record if it changed. Blocks. A failure is logged: what is placed now is not affected by it."""
        data = msgspec.json.format(msgspec.json.encode(_Document(list(self._placed.values()), list(self._unplaced))))
        if data == self._written:
            return
        try:
            self._folder.write(NAME, data)
        except MeshdError as error:
            log.warning("what is placed here can't be recorded, and would not be placed again after a restart: %s", error)
        else:
            self._written = data


def restored_though_unplaced(adverts: Iterable[Advert], placements: Placements) -> list[tuple[PeerId, ModelId]]:
    """Find peers that restored models which were unplaced while they were off."""
    return [
        (advert.peer, model)
        for advert in adverts
        for model in dict.fromkeys(holding.model for holding in advert.holdings if holding.restored and holding.state == "active")
        if model in placements.unplaced
    ]


def placed_anew(adverts: Iterable[Advert], placements: Placements) -> set[ModelId]:
    """Find models that were unplaced, and that some peer serves though it has not restored them."""
    return {
        holding.model
        for advert in adverts
        for holding in advert.holdings
        if holding.state == "active" and not holding.restored and not holding.standby and holding.model in placements.unplaced
    }
