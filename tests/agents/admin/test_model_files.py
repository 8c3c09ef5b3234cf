"""Models are pulled and removed for users of the API, and every pull is published."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.journals import HandClock
from in_process.peers import Peers, until
from meshd.agents.admin import model_files
from meshd.agents.admin.model_files import ModelFiles, PullEvents
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.sources import WeightSources
from meshd.clock import SystemClock
from meshd.errors import DownloadError, InvalidRequest, Overloaded, UnknownModel
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store, StoredModel
from meshd.types import PeerId
from tiny.gguf_file import write_gguf

Report = Callable[[PullProgress], None]


class HeldStore(Store):
    """A store whose pulls report some steps and wait; then they pull a file of this device."""

    def __init__(self, root: Path, file: Path) -> None:
        super().__init__(root)
        self.file = file
        self.go = asyncio.Event()
        self.stopped = 0

    async def pull(self, ref: str, progress: Report = lambda _: None) -> StoredModel:
        progress(PullProgress(model=ref, source="there", phase=PullPhase.FINDING))
        for done in (1, 2, 3):
            progress(PullProgress(model=ref, source="there", phase=PullPhase.DOWNLOADING, done_bytes=done, total_bytes=3))
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        if ref == "breaks":
            raise DownloadError("the source is gone")
        return await super().pull(f"file:{self.file}", progress)


@pytest.fixture
def stream() -> EventStream:
    return EventStream(PeerId("p"), "desk", HandClock(1.0))


@pytest.fixture
async def files(peers: Peers, tmp_path: Path, stream: EventStream) -> ModelFiles:
    links = peers.start("a").links
    sources = WeightSources(links.id, links, adverts=list, names=str, clock=SystemClock(), link_stats=dict)
    library = ModelLibrary(
        links=links,
        store=HeldStore(tmp_path, write_gguf(tmp_path / "source.gguf", layers=1)),
        adverts=list,
        on_change=lambda: None,
        headers=HeaderFetcher(links, sources),
        on_pull=PullEvents(stream, HandClock(1.0)).on_step,
    )
    return ModelFiles(library)


def store_of(files: ModelFiles) -> HeldStore:
    store = files.library.store
    assert isinstance(store, HeldStore)
    return store


async def rest(steps: AsyncIterator[PullProgress]) -> list[PullProgress]:
    return [step async for step in steps]


def published(stream: EventStream) -> list[tuple[str, str]]:
    events: list[dict[str, Any]] = [msgspec.json.decode(event.line) for event in stream.since(0)[1]]
    return [(event["phase"], event["message"]) for event in events if event["type"] == "pull"]


async def test_a_pull_shows_its_newest_progress_and_the_model_is_then_known(files: ModelFiles, stream: EventStream) -> None:
    steps = files.pull("some:model")
    assert (await anext(steps)).done_bytes == 3  # the steps before it are not queued
    store_of(files).go.set()
    *_, last = await rest(steps)
    assert last.phase is PullPhase.DONE
    (card,) = files.library.local.values()
    assert (await files.library.known(card.name)).id == card.id
    assert [phase for phase, _ in published(stream)][:2] == ["finding", "downloading"]
    assert published(stream)[-1][0] == "done"
    here = await rest(files.pull(card.name))
    assert [(step.model, step.phase) for step in here] == [(card.name, PullPhase.DONE)]
    assert await files.remove(card.name) == 0  # the file is the user's own
    assert files.library.local == {}
    with pytest.raises(UnknownModel):
        await files.remove(card.name)


async def test_a_client_that_goes_away_stops_its_pull(files: ModelFiles, stream: EventStream) -> None:
    steps = files.pull("some:model")
    await anext(steps)
    await steps.aclose()
    assert store_of(files).stopped == 1
    assert published(stream)[-1] == ("ended", "it was stopped")


async def test_a_failed_pull_is_raised_and_published(files: ModelFiles, stream: EventStream) -> None:
    store_of(files).go.set()
    with pytest.raises(DownloadError):
        await rest(files.pull("breaks"))
    assert published(stream)[-1] == ("ended", "the source is gone")


async def test_few_pulls_run_at_once_and_none_reads_a_file_of_this_device(files: ModelFiles, tmp_path: Path) -> None:
    running = [asyncio.create_task(rest(files.pull(f"model:{number}"))) for number in range(model_files.MAX_PULLS)]
    await until(lambda: files._running == model_files.MAX_PULLS)
    with pytest.raises(Overloaded, match="wait until"):
        await anext(files.pull("one:more"))
    store_of(files).go.set()
    await asyncio.gather(*running)
    with pytest.raises(InvalidRequest, match="device's owner"):
        await rest(files.pull(f"file:{tmp_path / 'secret'}"))
    assert files._running == 0


def test_progress_is_published_twice_a_second_and_each_phase_once(stream: EventStream) -> None:
    clock = HandClock(1.0)
    events = PullEvents(stream, clock)
    for tenth in range(20):
        clock.now = 1.0 + tenth / 10
        events.on_step(PullProgress(model="m", source="s", phase=PullPhase.DOWNLOADING, done_bytes=tenth))
    for phase in (PullPhase.CHECKING, PullPhase.DONE):
        events.on_step(PullProgress(model="m", source="s", phase=phase))
    assert [phase for phase, _ in published(stream)] == ["downloading"] * 4 + ["checking", "done"]
    assert events._published == {}
