"""Pulls models to this peer's disk and removes them, for users of its API, and publishes the progress of every pull."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final

from meshd.agents.observe.events import PullProgressed
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.model_library import ModelLibrary
from meshd.clock import Clock
from meshd.errors import Overloaded
from meshd.models.store.progress import PullPhase, PullProgress

MAX_PULLS: Final = 2
"""Pulls that clients may have at once. Each fills the network and the disk, so that more of them would be slower for all."""
_RETRY_S = 10.0
_EVENT_EVERY_S = 0.5


@dataclass(slots=True)
class ModelFiles:
    """The files of models on this peer's disk."""

    library: ModelLibrary
    _running: int = 0

    async def pull(self, ref: str) -> AsyncGenerator[PullProgress, None]:
        """Fetch a model from its source, unless it is here. Yields the newest progress, and `done` at the end.

        Raises: Overloaded; what `ModelLibrary.pull` raises.
        Cancel: the pull stops. The bytes received so far stay, and the next pull resumes from them.
        """
        if self._running >= MAX_PULLS:
            why = f"{MAX_PULLS} models are being pulled to this peer"
            raise Overloaded(why, hint="wait until one of them is done", retry_after_s=_RETRY_S)
        latest: list[PullProgress] = []
        changed = asyncio.Event()

        def report(step: PullProgress) -> None:
            latest[:] = [step]  # only the newest counts, so a slow client delays nothing and queues nothing
            changed.set()

        self._running += 1
        pulling = asyncio.create_task(self.library.pull(ref, report), name=f"pull {ref}")
        pulling.add_done_callback(lambda _: changed.set())
        try:
            while not pulling.done():
                await changed.wait()
                changed.clear()
                while latest and latest[0].phase is not PullPhase.DONE:
                    yield latest.pop()
            card = pulling.result()
            size = card.weight_bytes  # of a model that was here already
            here = PullProgress(model=card.name, source=card.ref, phase=PullPhase.DONE, done_bytes=size, total_bytes=size)
            yield latest[0] if latest else here
        finally:
            self._running -= 1
            pulling.cancel()
            await asyncio.gather(pulling, return_exceptions=True)

    async def remove(self, name: str) -> int:
        """Remove a model from this peer's disk. Layers in memory stay until they are unplaced.

        Returns: the bytes freed. Raises: UnknownModel, StorageError.
        """
        freed = await asyncio.to_thread(self.library.store.remove, name)
        await self.library.refresh()
        return freed


@dataclass(slots=True)
class PullEvents:
    """Publishes the progress of pulls: each phase once, and twice a second in between."""

    events: EventStream
    clock: Clock
    _published: dict[str, tuple[PullPhase, float]] = field(default_factory=dict)
    """Phase and time of the last event about each running pull."""

    def on_step(self, step: PullProgress) -> None:
        """Publish a step, unless one of the same phase was published just now."""
        now = self.clock.monotonic()
        phase, at = self._published.get(step.model, (None, 0.0))
        if phase is step.phase and now - at < _EVENT_EVERY_S:
            return
        self._published[step.model] = step.phase, now
        if step.phase in (PullPhase.DONE, PullPhase.ENDED):
            del self._published[step.model]
        self.events.publish(
            PullProgressed(
                model=step.model,
                source=step.source,
                phase=step.phase.value,
                done_bytes=step.done_bytes,
                total_bytes=step.total_bytes,
                message=step.message,
            )
        )
