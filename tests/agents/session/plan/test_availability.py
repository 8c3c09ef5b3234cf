"""The models that a request would be answered with: loaded ones, and those that would be loaded."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from in_process.adverts import CARD, advert, held
from meshd.agents.session.plan import availability
from meshd.agents.session.plan.availability import Availability
from meshd.types import Advert, ModelCard, ModelId

HUGE = msgspec.structs.replace(CARD, id=ModelId("huge"), name="huge", layer_bytes=(1 << 40,) * 30, layer_weights={})
"""A model that no device here has memory for."""


def available(adverts: list[Advert], *cards: ModelCard) -> Availability:
    library = SimpleNamespace(
        cards=lambda: {card.id: card for card in cards or (CARD,)}, readable=lambda model: model != ModelId("unreadable")
    )
    return Availability(cast("Any", library), lambda: adverts)


async def names(found: Availability) -> dict[str, bool]:
    return {model.card.name: model.loaded for model in await found.models()}


async def test_a_model_on_disk_that_fits_is_available_and_not_loaded() -> None:
    assert await names(available([advert("a")])) == {CARD.name: False}


async def test_a_model_whose_layers_are_all_held_is_loaded() -> None:
    assert await names(available([advert("a", held(0, 12)), advert("b", held(12, 30))])) == {CARD.name: True}
    assert await names(available([advert("a", held(0, 12)), advert("b", held(13, 30))])) == {CARD.name: False}


async def test_a_model_that_fits_nowhere_is_not_available() -> None:
    both = msgspec.structs.replace(advert("a"), models=(CARD, HUGE))
    assert await names(available([both], CARD, HUGE)) == {CARD.name: False}


async def test_a_model_of_which_no_peer_has_the_file_is_available_only_while_it_is_loaded() -> None:
    bare = msgspec.structs.replace(advert("a", held(0, 12)), models=())
    assert await names(available([bare])) == {}
    assert await names(available([bare, msgspec.structs.replace(advert("b", held(12, 30)), models=())])) == {CARD.name: True}


async def test_a_search_is_made_once_for_each_state_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    solve = availability.solve
    monkeypatch.setattr(availability, "solve", lambda problem: searched.append(problem.card.name) or solve(problem))
    adverts = [advert("a")]
    found = available(adverts)
    await asyncio.gather(*(found.models() for _ in range(5)))
    adverts[0] = msgspec.structs.replace(adverts[0], revision=9, sessions=3)
    await found.models()
    assert searched == [CARD.name]
    adverts.append(advert("b"))
    await found.models()
    assert searched == [CARD.name] * 2


async def test_a_model_whose_text_can_not_be_read_is_not_available() -> None:
    broken = msgspec.structs.replace(CARD, id=ModelId("unreadable"), name="broken")
    held_and_stored = msgspec.structs.replace(advert("a"), models=(CARD, broken))
    assert await names(available([held_and_stored], CARD, broken)) == {CARD.name: False}
