"""Replacements for what a simulated peer does not have: model files, downloads, telemetry."""

import random
from collections.abc import Callable
from typing import Any, Self

from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.text.model_texts import ModelText
from meshd.types import LayerRange, ModelCard, ModelId
from sim.loop import SimClock
from sim.toy.text import toy_text

_READ_LAYER_S = 0.1
"""Half of the longest virtual time to read one layer, in seconds."""


class NoTelemetry:
    """Replaces `Telemetry`. Every method does nothing."""

    def __getattr__(self, name: str) -> Any:
        setattr(self, name, _nothing)  # so that the next access finds it faster
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    pass


class SimFile:
    """A model file without tensors."""

    def tensor(self, name: str) -> Any:
        raise NotImplementedError

    def __contains__(self, name: str) -> bool:
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def release_pages(self) -> None:
        pass

    def close(self) -> None:
        pass


class SimStore:
    """A model store that has the files of all models of the run."""

    def __init__(self, cards: tuple[ModelCard, ...]) -> None:
        self._cards = {card.id: card for card in cards}

    def get(self, key: str) -> ModelCard | None:
        return next((card for card in self._cards.values() if key in (card.id, card.ref, card.name)), None)

    def list(self) -> list[ModelCard]:
        return list(self._cards.values())

    def open(self, stored: ModelCard) -> SimFile:
        return SimFile()


class SimLibrary(ModelLibrary):
    """The model library over a `SimStore`, with the toy model's text."""

    async def run(self) -> None:
        """Return at once: no other process changes the store."""

    async def known(self, name: str) -> ModelCard:
        return self.find(name)

    async def refresh(self) -> None:
        self.local = {card.id: card for card in self.store.list()}  # type: ignore[misc]

    async def text(self, card: ModelCard) -> ModelText:
        return toy_text(card)

    def warm(self, card: ModelCard) -> None:
        pass

    def open(self, card: ModelCard) -> Any:
        return SimFile()


class SimWeights:
    """Replaces `meshd.agents.placement.weights.provider.WeightProvider`: all weights are on disk, reading takes time."""

    def __init__(self, cards: tuple[ModelCard, ...], clock: SimClock, rng: random.Random) -> None:
        self._cards = {card.id: card for card in cards}
        self._clock = clock
        self._rng = rng

    async def card(self, model: ModelId, ref: str) -> ModelCard:
        return self._cards[model]

    async def fill(self, card: ModelCard, ref: str, layers: LayerRange, progress: Callable[[float], None]) -> None:
        for share in (0.5, 1.0):
            await self._clock.sleep(self._rng.random() * _READ_LAYER_S * len(layers))
            progress(share)
