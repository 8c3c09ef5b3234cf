"""The progress of a pull: what is counted, when it is reported, and how a thread is stopped."""

import asyncio
import threading
import time

import pytest

from meshd.errors import Cancelled
from meshd.models.store import progress
from meshd.models.store.progress import ProgressMeter, PullPhase, PullProgress, in_thread


@pytest.fixture
def steps() -> list[PullProgress]:
    return []


@pytest.fixture
async def meter(steps: list[PullProgress]) -> ProgressMeter:
    return ProgressMeter("tiny", steps.append)


async def test_every_phase_is_reported_at_once_and_keeps_the_source(meter: ProgressMeter, steps: list[PullProgress]) -> None:
    meter.begin(PullPhase.FINDING, source="pypi:tiny==1")
    meter.begin(PullPhase.DOWNLOADING, done=5, total=10)
    meter.begin(PullPhase.FAILED, source="hf:org/tiny", message="HTTP status 404")
    assert steps == [
        PullProgress(model="tiny", source="pypi:tiny==1", phase=PullPhase.FINDING),
        PullProgress(model="tiny", source="pypi:tiny==1", phase=PullPhase.DOWNLOADING, done_bytes=5, total_bytes=10),
        PullProgress(model="tiny", source="hf:org/tiny", phase=PullPhase.FAILED, message="HTTP status 404"),
    ]


async def test_bytes_are_reported_at_intervals_and_at_the_end(
    meter: ProgressMeter, steps: list[PullProgress], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "time", type("Time", (), {"monotonic": staticmethod(lambda: now)}))
    meter.begin(PullPhase.DOWNLOADING, total=10)
    meter.advance(1)
    now += 0.2
    meter.advance(2)
    meter.advance(3)
    meter.advance(4)
    assert [step.done_bytes for step in steps] == [0, 3, 10]


async def test_a_resumed_file_counts_after_the_files_that_are_finished(meter: ProgressMeter, steps: list[PullProgress]) -> None:
    meter.begin(PullPhase.DOWNLOADING)
    meter.restart(30)
    meter.settle(100)
    meter.restart(7)
    meter.settle(50)
    meter.begin(PullPhase.CHECKING)
    assert [step.done_bytes for step in steps] == [0, 100, 150, 0]


async def test_bytes_counted_in_a_thread_are_reported_on_the_event_loop() -> None:
    threads: list[int] = []
    meter = ProgressMeter("tiny", lambda _: threads.append(threading.get_ident()))
    meter.begin(PullPhase.CHECKING, total=3)
    await in_thread(meter, meter.advance, 3)
    await asyncio.sleep(0)
    assert threads == [threading.get_ident()] * 2


async def test_a_cancelled_thread_stops_at_its_next_chunk_and_is_awaited(meter: ProgressMeter) -> None:
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        try:
            while True:
                started.set()
                time.sleep(0.001)
                meter.advance(1)
        finally:
            ended.set()

    task = asyncio.create_task(in_thread(meter, work))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    with pytest.raises(Cancelled, match="the pull of tiny was stopped"):
        meter.advance(1)


async def test_an_error_in_the_thread_reaches_the_caller(meter: ProgressMeter) -> None:
    with pytest.raises(ZeroDivisionError):
        await in_thread(meter, lambda: 1 // 0)
