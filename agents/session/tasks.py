"""The asyncio tasks of one answer. They are cancelled when the answer ends."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class AnswerTasks:
    """Owns an answer's tasks, among them at most one search for a plan."""

    _running: set["asyncio.Task[None]"] = field(default_factory=set)
    _search: "asyncio.Task[None] | None" = None

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a task until it returns or `cancel` is called."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def search(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a search for a plan, and cancel the previous one."""
        if self._search is not None:
            self._search.cancel()
        self._search = self.spawn(work)

    def cancel(self) -> None:
        for task in self._running:
            task.cancel()
