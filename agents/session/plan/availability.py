"""Which models a request would be answered with: those whose layers are loaded, and those that would be loaded for it."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import LEAST_CONTEXT, plan_input_of
from meshd.agents.service import AvailableModel, MeshOptions
from meshd.errors import MeshdError
from meshd.planner.profile import USABLE_STATE
from meshd.planner.search.solve import solve
from meshd.types import Advert, ModelCard, ModelId

log = getLogger(__name__)

_MEMORY_STEP_BYTES = 64 << 20
"""Free memory is compared in steps of this size: each session changes it a little, and no model begins to fit by that."""

_KEPT_SEARCHES = 4


@dataclass(slots=True)
class Availability:
    """Finds the available models. Whether a model that is not loaded would fit is searched once per state of the cluster."""

    library: ModelLibrary
    adverts: Callable[[], list[Advert]]
    _searches: OrderedDict[Hashable, "asyncio.Task[frozenset[ModelId]]"] = field(default_factory=OrderedDict)
    """The last searches, by the state of the cluster that they are for. Result: the models that fit."""

    async def models(self) -> list[AvailableModel]:
        """Returns: all available models, in the order of the library.

        Cancel: a search that has begun continues for its other callers, and for the next one.
        """
        adverts = self.adverts()
        cards = {model: card for model, card in self.library.cards().items() if self.library.readable(model)}
        loaded = {card.id for card in cards.values() if covered(card, adverts)}
        on_disk = {card.id for advert in adverts for card in advert.models if not advert.draining}
        waiting = [card for card in cards.values() if card.id in on_disk and card.id not in loaded]
        fitting = await self._fitting(waiting, adverts) if waiting else frozenset()
        available = (card for card in cards.values() if card.id in loaded or card.id in fitting)
        return [AvailableModel(card=card, loaded=card.id in loaded) for card in available]

    async def _fitting(self, cards: list[ModelCard], adverts: list[Advert]) -> frozenset[ModelId]:
        """Find the models that some placement fits. The search is not repeated in the same state."""
        state = _state_of(cards, adverts)
        search = self._searches.get(state)
        if search is None:
            search = asyncio.get_running_loop().create_task(_search(cards, adverts), name="search for placements")
            self._searches[state] = search
            if len(self._searches) > _KEPT_SEARCHES:
                self._searches.popitem(last=False)
        return await asyncio.shield(search)


async def _search(cards: list[ModelCard], adverts: list[Advert]) -> frozenset[ModelId]:
    # On a thread: with many peers the search would delay heartbeats for too long.
    return await asyncio.to_thread(lambda: frozenset(card.id for card in cards if _fits(card, adverts)))


def covered(card: ModelCard, adverts: list[Advert]) -> bool:
    """Whether the live peers together hold all layers of a model."""
    reached = 0
    held = (held for advert in adverts for held in advert.holdings if held.model == card.id and held.state == USABLE_STATE)
    for layers in sorted(holding.layers for holding in held):
        if layers.start <= reached:
            reached = max(reached, layers.end)
    return reached == card.spec.layers


def _fits(card: ModelCard, adverts: list[Advert]) -> bool:
    """Whether a placement of the model exists, with KV for the least context that a request can be given."""
    try:
        solve(plan_input_of(card, adverts, MeshOptions(), context=min(LEAST_CONTEXT, card.spec.context_length)))
    except MeshdError as error:
        log.debug("%s fits nowhere: %s", card.name, error)
        return False
    return True


def _state_of(cards: list[ModelCard], adverts: list[Advert]) -> Hashable:
    """What a search for placements depends on. It leaves out what changes with every step of a session."""
    peers = frozenset(
        (
            advert.peer,
            advert.incarnation,
            advert.draining,
            advert.capability.roles,
            advert.capability.memory_free_bytes // _MEMORY_STEP_BYTES,
            frozenset((held.model, held.layers, held.state, held.standby) for held in advert.holdings),
        )
        for advert in adverts
    )
    return frozenset(card.id for card in cards), peers
