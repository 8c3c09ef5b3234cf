"""The tasks of one answer, which end with it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class AnswerTasks:
    """Runs tasks, and at most one search for a plan."""

    _running: set["asyncio.Task[None]"] = field(default_factory=set)
    _search: "asyncio.Task[None] | None" = None

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a task until it ends or the answer does."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def search(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a search for a plan, and cancel the one before it."""
        if self._search is not None:
            self._search.cancel()
        self._search = self.spawn(work)

    def cancel(self) -> None:
        for task in self._running:
            task.cancel()
