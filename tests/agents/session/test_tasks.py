"""The tasks of one answer: all can be cancelled, and at most one search for a plan runs at a time."""

import asyncio

from meshd.agents.session.tasks import AnswerTasks


async def forever(ended: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append(name)


async def nothing() -> None:
    pass


async def test_a_task_that_ends_is_forgotten() -> None:
    tasks = AnswerTasks()
    task = tasks.spawn(nothing())
    assert len(tasks) == 1
    await task
    await asyncio.sleep(0)
    assert len(tasks) == 0


async def test_a_new_search_cancels_the_one_before_it_and_no_other_task() -> None:
    tasks, ended = AnswerTasks(), list[str]()
    other = tasks.spawn(forever(ended, "other"))
    tasks.search(forever(ended, "first"))
    await asyncio.sleep(0)
    tasks.search(forever(ended, "second"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ended == ["first"]
    assert len(tasks) == 2
    tasks.cancel()
    await asyncio.gather(other, return_exceptions=True)


async def test_a_search_may_follow_one_that_has_ended() -> None:
    tasks, ended = AnswerTasks(), list[str]()
    tasks.search(nothing())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks.search(forever(ended, "second"))
    await asyncio.sleep(0)
    assert len(tasks) == 1
    tasks.cancel()
    await asyncio.sleep(0)
    assert ended == ["second"]


async def test_cancel_ends_all_tasks() -> None:
    tasks, ended = AnswerTasks(), list[str]()
    running = [tasks.spawn(forever(ended, name)) for name in "ab"]
    await asyncio.sleep(0)
    tasks.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.sleep(0)
    assert sorted(ended) == ["a", "b"]
    assert len(tasks) == 0
