"""Stages that were accepted but are not open yet: their KV is reserved, and a worker thread reads what else they need."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage.kv import KvManager, SessionKv, StageCache
from meshd.agents.stage.steps import ActiveStage
from meshd.errors import MeshdError, Unavailable
from meshd.kernels.sampling.sampler import Sampler
from meshd.protocol.messages import Open
from meshd.types import SessionId


@dataclass(slots=True, eq=False)
class PreparingStage:
    """A stage that is being prepared. It is a user of its KV and of the stage over its layers."""

    open: Open
    session_kv: SessionKv
    cache: StageCache
    resident: ResidentLayers
    make_sampler: Callable[[], Sampler] | None
    """Makes the last stage's sampler, which takes long if many tokens are known. None: the stage is not the last one."""
    outcome: "asyncio.Future[ActiveStage]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def key(self) -> tuple[SessionId, int]:
        return self.open.session, self.open.stage


@dataclass(slots=True)
class PreparingStages:
    """All stages on this peer that are being prepared."""

    kv_manager: KvManager
    on_change: Callable[[], None]
    _stages: dict[tuple[SessionId, int], PreparingStage] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._stages)

    def get(self, session: SessionId, stage: int) -> PreparingStage | None:
        return self._stages.get((session, stage))

    def begin(self, stage: PreparingStage) -> None:
        """Add a stage. From here on it is a user of its KV and of the stage over its layers."""
        self._stages[stage.key] = stage
        stage.cache.lease.acquire()
        stage.resident.stages.enter(stage.cache.layers)

    def opened(self, stage: PreparingStage, active: ActiveStage) -> None:
        """Remove a stage that is open. The active stage takes its place as a user."""
        del self._stages[stage.key]
        stage.outcome.set_result(active)

    def is_current(self, stage: PreparingStage) -> bool:
        """Whether the stage is still being prepared."""
        return self._stages.get(stage.key) is stage

    def end(self, stage: PreparingStage, error: MeshdError) -> None:
        """End a stage before it is open, and free what it has reserved. No effect if it has ended or is open."""
        if not self.is_current(stage):
            return
        del self._stages[stage.key]
        stage.outcome.set_exception(error)
        stage.outcome.exception()  # marks it as seen: perhaps nobody waits for it
        if stage.cache.log is not None:
            stage.cache.log.pinned = False
        if stage.cache in stage.session_kv.caches:
            self.kv_manager.drop(stage.session_kv, stage.cache)
        stage.cache.lease.release()
        stage.resident.stages.leave(stage.cache.layers)
        self.on_change()

    def end_before(self, session: SessionId, epoch: int, reason: str) -> None:
        """End the session's stages of epochs before `epoch`."""
        for stage in [stage for stage in self._stages.values() if stage.open.session == session]:
            if stage.open.epoch < epoch:
                self.end(stage, Unavailable(f"stage {stage.open.stage} was not opened: {reason}"))
