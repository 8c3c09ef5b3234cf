"""The models of `meshd up --model`: readiness, retries, and models that can never work."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from in_process.adverts import CARD
from meshd.agents.placement.preload import Preload
from meshd.agents.service import MeshOptions
from meshd.clock import SystemClock
from meshd.errors import DoesNotFit, NotReady, PeerLost, UnknownModel
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.types import ModelCard


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


class RecordedSleeps(SystemClock):
    """Does not sleep, and records how long each sleep should be."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)


@dataclass
class Models:
    """Stands for the library and the placer: `place` raises each of `failures` once, then succeeds."""

    here: set[str]
    failures: list[Exception] = field(default_factory=list)
    pulled: list[str] = field(default_factory=list)
    placed: int = 0

    async def known(self, name: str) -> ModelCard:
        if name not in self.here:
            raise UnknownModel(f"no model {name}")
        return CARD

    async def pull(self, ref: str, progress: Callable[[PullProgress], None], *, by_owner: bool) -> ModelCard:
        assert by_owner
        if ref == "nonsense":
            raise UnknownModel(f"no source has {ref}")
        progress(PullProgress(model=ref, source="", phase=PullPhase.DONE))
        self.pulled.append(ref)
        return CARD

    async def place(self, card: ModelCard, mesh: MeshOptions) -> AsyncIterator[None]:
        if self.failures:
            raise self.failures.pop(0)
        self.placed += 1
        yield None


async def run(models: Models, *wanted: str, covered: bool = False) -> tuple[Preload, list[float]]:
    """Run a preload. Returns: the preload, and its sleeps after the first one."""
    clock = RecordedSleeps()
    finished = Preload(wanted, cast("Any", models), cast("Any", models), lambda card: covered, clock)
    await finished.run()
    return finished, clock.sleeps[1:]


async def test_a_model_of_the_cluster_is_not_pulled_and_an_unknown_one_is() -> None:
    models = Models({"here"})
    done, _ = await run(models, "here", "elsewhere")
    assert (models.pulled, models.placed, done.readiness()[0]) == (["elsewhere"], 2, True)


async def test_a_model_that_is_served_already_is_not_placed_again() -> None:
    models = Models({"here"})
    await run(models, "here", covered=True)
    assert models.placed == 0


async def test_a_placement_that_fails_for_now_is_retried() -> None:
    models = Models({"here"}, [NotReady("busy", retry_after_s=0.5), DoesNotFit("too large"), PeerLost("silent")])
    _, sleeps = await run(models, "here")
    assert models.placed == 1
    assert sleeps == [0.5, 10.0, 5.0]


async def test_a_model_without_a_source_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    models = Models({"here"})
    done, sleeps = await run(models, "nonsense", "here")
    assert (models.placed, sleeps, done.readiness()) == (1, [], (True, 1.0, ""))
    assert "nonsense is not placed: no source has nonsense" in caplog.text
