"""Places again, after this peer was restarted, what was placed on it before."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.history import holdings_of, layers_of
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.restart.placements import PlacedLayers, Placements
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import Place
from meshd.types import Advert, LayerRange, ModelId, PeerId, ranges_of

log = getLogger(__name__)

_GATHER_S = 3.0
"""Delay of the first load, so that peers that kept running, and took the layers over, are found before."""
_OTHERS_S = 20.0
"""How long the peers that held the model's other layers may take to return. Then those layers are placed elsewhere."""
_RETRY_S = 5.0
_LONGEST_RETRY_S = 300.0


@dataclass(slots=True, kw_only=True)
class Restorer:
    """Owns the restoration of this peer's recorded placements."""

    me: PeerId
    placements: Placements
    loader: Loader
    placer: PlacementClient
    adverts: Callable[[], list[Advert]]
    """Returns the adverts of all live peers, this one included."""
    clock: Clock

    async def run(self) -> None:
        """Load the recorded layers, then see to it that their models are whole.

        A failure is logged once and tried again. An entry that ended meanwhile is not loaded. Cancel: a load that has begun ends
        with the loader.
        """
        waiting = list(self.placements.placed)
        if not waiting:
            return
        await self.clock.sleep(_GATHER_S)
        pause_s, logged = _RETRY_S, set[str]()
        while True:
            waiting = [entry for entry in waiting if not await self._placed(entry, logged)]
            if not waiting:
                break
            await self.clock.sleep(pause_s)
            pause_s = min(_LONGEST_RETRY_S, 2 * pause_s)
        await self.clock.sleep(_OTHERS_S)
        for model in dict.fromkeys(entry.model for entry in self.placements.placed):
            await self._complete(model)

    async def _placed(self, entry: PlacedLayers, logged: set[str]) -> bool:
        """Load one entry's layers. Returns: False if that failed and is to be tried again."""
        if entry not in self.placements.placed:
            return True
        if self._served_elsewhere(entry.model, entry.layers):
            self.placements.released(entry.model, entry.layers)
            return True
        request = Place(
            request=0,
            model=entry.model,
            ref=entry.ref,
            layers=entry.layers,
            kv_tokens=entry.kv_tokens,
            deadline_ms=0,
            pinned=entry.pinned,
        )
        try:
            await self.loader.place(request, restored=True)
        except MeshdError as error:
            if (text := str(error)) not in logged:
                logged.add(text)
                log.warning("layers %s of %s were placed here before, and can't be loaded yet: %s", entry.layers, entry.name, text)
            return False
        log.info("layers %s of %s are placed again, as before the restart", entry.layers, entry.name)
        return True

    def _served_elsewhere(self, model: ModelId, layers: LayerRange) -> bool:
        others = [advert for advert in self.adverts() if advert.peer != self.me]
        served = layers_of(holding for _, holding in holdings_of(others, model) if not holding.standby)
        return served.issuperset(layers)

    async def _complete(self, model: ModelId) -> None:
        """Place the layers of a model that no live peer holds, if this peer is the first of its holders."""
        holdings = [(peer, holding) for peer, holding in holdings_of(self.adverts(), model) if not holding.standby]
        mine = next((resident for resident in self.loader.residents.of(model)), None)
        if mine is None or min((peer for peer, _ in holdings), default="") != self.me:
            return
        missing = ranges_of(sorted(set(mine.card.layers) - layers_of(holding for _, holding in holdings)))
        if not missing:
            return
        what = f"layers {', '.join(map(str, missing))} of {mine.card.name}"
        log.info("%s were placed before the restart on peers that did not return: they are placed again", what)
        try:
            await self.placer.repair(mine.card, missing, kv_tokens=mine.kv_tokens, least_tokens=min(mine.kv_tokens, 512))
        except MeshdError as error:
            log.warning("%s can't be placed again: %s", what, error)
