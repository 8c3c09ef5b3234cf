"""Tracks which layers each peer serves, to distinguish lost layers from unplaced models.

House rules of this file: no I/O, no clock.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from meshd.types import Advert, Holding, LayerRange, ModelId, PeerId

HELD = frozenset({"loading", "warm", "active"})
"""States of a holding whose layers serve sessions or soon will."""


@dataclass(frozen=True, slots=True, order=True)
class ServedLayers:
    """A run of layers that a peer serves, or served before the peer was lost."""

    layers: LayerRange
    kv_tokens: int
    pinned: bool = False


class HoldingHistory:
    """Compares the adverts of successive updates to find lost layers and unplaced models.

    Layers are lost when their peer is gone or has restarted. A model is unplaced when a linked peer stops serving it.
    """

    def __init__(self) -> None:
        self.lost: dict[ModelId, set[ServedLayers]] = {}
        """Lost layers that no other peer serves yet, of models that are still active somewhere."""
        self.unplaced: set[ModelId] = set()
        """Unplaced models of which some peer still has a standby copy."""
        self._served: dict[tuple[PeerId, int], dict[ModelId, set[ServedLayers]]] = {}
        """The layers that each peer serves, by (peer, incarnation) and model."""
        self._newly_unplaced: set[ModelId] = set()
        """Models that some linked peer has stopped serving since the last update."""

    def note(self, advert: Advert) -> None:
        """Record one advert when it arrives, so that layers that are loaded and lost between two updates count as lost."""
        after = served_by(advert)
        before = self._served.get((advert.peer, advert.incarnation), {})
        self._newly_unplaced |= before.keys() - after.keys()
        self._served[advert.peer, advert.incarnation] = after

    def update(self, adverts: Iterable[Advert]) -> None:
        """Record the adverts of all peers whose link is up, and recompute `lost` and `unplaced`."""
        known = list(adverts)
        for advert in known:
            self.note(advert)
        now = {(advert.peer, advert.incarnation): self._served[advert.peer, advert.incarnation] for advert in known}
        for peer, models in self._served.items():
            if peer not in now:
                for model, layers in models.items():
                    self.lost.setdefault(model, set()).update(layers)
        unplaced, self._newly_unplaced = self._newly_unplaced, set()
        served = {model for models in now.values() for model in models}
        self.unplaced = ((self.unplaced | unplaced) - served) & models_in(known, HELD)
        self._served = now
        self._drop_served(known, unplaced - served)

    def _drop_served(self, adverts: Sequence[Advert], unplaced: Collection[ModelId]) -> None:
        """Remove from `lost` the layers that another peer serves now, and the models that are unplaced or active on no peer."""
        staying = [advert for advert in adverts if not advert.draining]
        for model in self.lost.keys() - (models_in(adverts, {"active"}) - set(unplaced)):
            del self.lost[model]
        for model, lost in list(self.lost.items()):
            served = layers_of(
                holding for _, holding in holdings_of(staying, model) if holding.state == "active" and not holding.standby
            )
            self.lost[model] = {entry for entry in lost if not served.issuperset(entry.layers)}
            if not self.lost[model]:
                del self.lost[model]


def served_by(advert: Advert) -> dict[ModelId, set[ServedLayers]]:
    """Collect the layers that a peer serves or will soon serve, by model, without standby copies."""
    served: dict[ModelId, set[ServedLayers]] = {}
    for holding in advert.holdings:
        if holding.state in HELD and not holding.standby:
            served.setdefault(holding.model, set()).add(ServedLayers(holding.layers, holding.kv_tokens_total, holding.pinned))
    return served


def holdings_of(adverts: Iterable[Advert], model: ModelId) -> list[tuple[PeerId, Holding]]:
    """List the holdings of a model in a state of `HELD`, standby copies included, each with its peer."""
    return [
        (advert.peer, holding)
        for advert in adverts
        for holding in advert.holdings
        if holding.model == model and holding.state in HELD
    ]


def models_in(adverts: Iterable[Advert], states: Collection[str]) -> set[ModelId]:
    """Collect the models of which at least one peer has a holding in one of these states."""
    return {holding.model for advert in adverts for holding in advert.holdings if holding.state in states}


def layers_of(holdings: Iterable[Holding]) -> set[int]:
    return {layer for holding in holdings for layer in holding.layers}
