"""The order of ready steps: decodes first, in order of arrival, without starving prefills."""

from types import SimpleNamespace
from typing import Any

from meshd.agents.stage.scheduler import Scheduler
from meshd.agents.stage.session import Step


def step(number: int, *, prefill: bool) -> Step:
    return Step(number, 1, False, prefill)


def drained(queue: Scheduler) -> list[tuple[int, bool]]:
    taken = []
    while (job := queue.take()) is not None:
        taken.append((job[1].position, job[1].prefill))
    return taken


def test_decodes_go_first_each_in_order() -> None:
    queue = Scheduler()
    active: Any = SimpleNamespace()
    for number, prefill in ((0, True), (1, False), (2, True), (3, False)):
        queue.put(active, step(number, prefill=prefill))
    assert drained(queue) == [(1, False), (3, False), (0, True), (2, True)]


def test_a_prefill_is_next_after_eight_decodes() -> None:
    queue = Scheduler()
    active: Any = SimpleNamespace()
    queue.put(active, step(0, prefill=True))
    for number in range(1, 20):
        queue.put(active, step(number, prefill=False))
    assert [number for number, prefill in drained(queue) if prefill] == [0]
    queue.put(active, step(0, prefill=True))
    for number in range(1, 20):
        queue.put(active, step(number, prefill=False))
    order = [prefill for _, prefill in drained(queue)]
    assert order.index(True) <= 8


def test_a_prefill_without_room_for_its_output_is_passed_over() -> None:
    queue = Scheduler()
    full: Any = SimpleNamespace()
    free: Any = SimpleNamespace()
    for number, active in enumerate((full, free, full)):
        queue.put(active, step(number, prefill=True))
    taken = queue.take(lambda active, step: active is full)
    assert taken is not None
    assert taken[0] is free
    assert queue.take(lambda active, step: active is full) is None
    assert [number for number, _ in drained(queue)] == [0, 2]
