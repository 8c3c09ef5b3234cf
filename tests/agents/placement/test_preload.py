"""The readiness of the models of `meshd up --model`."""

from typing import Any

from meshd.agents.placement.preload import Preload
from meshd.clock import SystemClock


def preload(*wanted: str, **progress: Any) -> Preload:
    unused: Any = None
    return Preload(wanted, unused, unused, lambda card: True, SystemClock(), **progress)


def test_nothing_to_place_is_ready_at_once() -> None:
    assert preload().readiness() == (True, 1.0, "")


def test_a_fetched_model_counts_half_until_it_is_placed() -> None:
    assert preload("a", "b").readiness() == (False, 0.0, "waiting for peers to place a")
    assert preload("a", "b", fetched=1.0, doing="placing a").readiness() == (False, 0.25, "placing a")
    assert preload("a", "b", done=2).readiness() == (True, 1.0, "")


async def test_an_empty_list_ends_without_a_wait() -> None:
    await preload().run()
