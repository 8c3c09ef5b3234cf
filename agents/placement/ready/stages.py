"""Makes the stages that sessions compute with. All sessions of the same layers share one.

A stage over a part of the resident layers may need weights of its own at its borders. They are counted before they are read, and
read on a worker thread. They stay when the last session has ended, for the next one, until memory is short.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from meshd.agents.placement.resident import ResidentLayers, ResidentModels
from meshd.errors import NoPeer, OutOfMemory
from meshd.kernels.backend import LoadedLayers, Stage
from meshd.types import LayerRange


@dataclass(slots=True)
class _Job:
    """The making of a stage that reads weights."""

    task: "asyncio.Task[Stage]"
    sessions: int = 0
    """How many wait for it."""
    reads: bool = False
    """Whether a thread reads weights for it, which cannot be ended."""


@dataclass(slots=True)
class SharedStages:
    """Makes the stages over this peer's resident layers, one that reads weights at a time."""

    residents: ResidentModels
    spare_bytes: Callable[[], int]
    """Returns the bytes that may still be reserved."""
    on_change: Callable[[], None]
    """Called when weights were read or freed, and when a stage was made for which the layers were kept in memory."""
    _jobs: dict[tuple[int, LayerRange], _Job] = field(default_factory=dict)
    """By `id()` of the resident layers, and the layers of the stage."""
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def find(self, resident: ResidentLayers, layers: LayerRange) -> Stage | None:
        """Return the stage over some resident layers. Returns: None if it must read weights first (`prepare`)."""
        stages, weights = resident.stages, _weights(resident)
        stage = stages.made.get(layers)
        if stage is None and weights.border_bytes([*stages.made, layers]) == stages.border_bytes:
            stage = stages.made[layers] = weights.stage(layers)
        return stage

    async def prepare(self, resident: ResidentLayers, layers: LayerRange) -> Stage:
        """Return the stage over some resident layers, after it has read the weights that it needs.

        The caller is a user of the stage already (`StageTable.enter`).

        Raises: OutOfMemory if there is no room for them; ModelFileError; NoPeer if the layers were unloaded.
        Cancel: weights that are being read stay for the next session.
        """
        stage = self.find(resident, layers)
        if stage is not None:
            return stage
        key = id(resident), layers
        job = self._jobs.get(key)
        if job is None:
            task = asyncio.get_running_loop().create_task(self._make(resident, layers), name=f"make a stage over {layers}")
            job = self._jobs[key] = _Job(task)
            task.add_done_callback(partial(self._ended, key, job))
        job.sessions += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.sessions -= 1
            if not job.sessions and not job.reads:
                job.task.cancel()
                self._ended(key, job, job.task)  # the next session must not wait for a task that is about to end

    async def make_room(self, needed_bytes: int) -> None:
        """Free the stages that no session uses, with their weights, unless so many bytes are free anyway."""
        if self.spare_bytes() < needed_bytes and any(resident.stages.unused for resident in self.residents):
            async with self._lock:
                await self._free_unused()

    async def close(self) -> None:
        """End all work, except for weights that a thread reads."""
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, key: tuple[int, LayerRange], job: _Job, task: "asyncio.Task[Stage]") -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]
        if task.done() and not task.cancelled():
            task.exception()  # marks it as seen: the sessions that wait for it may have ended

    async def _make(self, resident: ResidentLayers, layers: LayerRange) -> Stage:
        resident.sessions += 1  # the weights must stay while a thread uses them, even if the session ends meanwhile
        try:
            async with self._lock:
                return self.find(resident, layers) or await self._read(resident, layers)
        finally:
            resident.sessions -= 1
            self.on_change()

    async def _read(self, resident: ResidentLayers, layers: LayerRange) -> Stage:
        stages, weights = resident.stages, _weights(resident)
        needed = weights.border_bytes([*stages.made, layers]) - stages.border_bytes
        if self.spare_bytes() < needed:
            await self._free_unused()
            needed = weights.border_bytes([*stages.made, layers]) - stages.border_bytes
        if self.spare_bytes() < needed:
            raise OutOfMemory(
                f"a stage over {layers} of {resident.layers} needs {needed} bytes of its own, more than are free here",
                hint="cut the layers where they were loaded, or wait for a session to end",
            )
        stages.reading_bytes = needed
        self._jobs[id(resident), layers].reads = True
        try:
            stage = await asyncio.to_thread(weights.stage, layers)
        finally:
            stages.reading_bytes = 0
        stages.made[layers] = stage
        stages.border_bytes = weights.border_bytes(stages.made)
        return stage

    async def _free_unused(self) -> None:
        """Free the stages that no session uses. Sessions that open meanwhile have them made again."""
        dropped: list[Stage] = []
        for resident in self.residents:
            stages = resident.stages
            dropped += [stages.made.pop(layers) for layers in stages.unused]
            if resident.weights is not None:
                stages.border_bytes = resident.weights.border_bytes(stages.made)
        await asyncio.to_thread(dropped.clear)  # a backend may take milliseconds to free a stage
        self.on_change()


def _weights(resident: ResidentLayers) -> LoadedLayers:
    if resident.weights is None:
        raise NoPeer(f"layers {resident.layers} were unloaded meanwhile", hint="place them again")
    return resident.weights
