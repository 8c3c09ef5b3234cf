"""Fetches and places the models of `meshd up --model` in the background, and retries until they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.service import MeshOptions
from meshd.clock import Clock
from meshd.errors import MeshdError, Unavailable, UnknownModel, UsageError
from meshd.models.store.progress import PullProgress
from meshd.types import ModelCard

log = getLogger(__name__)

_GATHER_S = 3.0
"""Delay of the first placement, so that peers that start at the same time are found and can take part."""
_RETRY_S = 5.0


@dataclass(slots=True)
class Preload:
    """Owns the models that the user wants loaded from the start, and their progress, which `/ready` reports."""

    wanted: Sequence[str]
    library: ModelLibrary
    placer: PlacementClient
    covered: Callable[[ModelCard], bool]
    """Returns whether every layer of a model is served by a live peer."""
    clock: Clock
    done: int = 0
    fetched: float = 0.0
    doing: str = ""

    async def run(self) -> None:
        """Place the models one after the other.

        A failure that may be temporary (no peers, too little memory) is retried. A UsageError is logged and its model is skipped.
        """
        if not self.wanted:
            return
        await self.clock.sleep(_GATHER_S)
        for ref in self.wanted:
            await self._place(ref)
            self.done += 1
        self.doing = ""

    def readiness(self) -> tuple[bool, float, str]:
        """See `service.Coordinator.readiness`."""
        if self.done == len(self.wanted):
            return True, 1.0, ""
        return (
            False,
            (self.done + 0.5 * self.fetched) / len(self.wanted),
            self.doing or f"waiting for peers to place {self.wanted[0]}",
        )

    async def _place(self, ref: str) -> None:
        logged = ""
        while True:
            try:
                self.doing, self.fetched = f"fetching {ref}", 0.0
                card = await self._card(ref)
                self.doing = f"placing {card.name}"
                if not self.covered(card):
                    async for _ in self.placer.place(card, MeshOptions()):
                        pass
                log.info("%s is placed and can answer", card.name)
                return
            except UsageError as error:
                log.error("%s is not placed: %s", ref, error)
                return
            except MeshdError as error:
                self.doing = str(error)
                if str(error) != logged:
                    logged = str(error)
                    log.warning("%s is not placed yet: %s", ref, error)
                await self.clock.sleep(error.retry_after_s if isinstance(error, Unavailable) else _RETRY_S)

    async def _card(self, ref: str) -> ModelCard:
        """Find a model's card in the cluster, or else fetch the model from its own source."""
        try:
            return await self.library.known(ref)
        except UnknownModel:
            return await self.library.pull(ref, self._progress, by_owner=True)

    def _progress(self, step: PullProgress) -> None:
        self.fetched = step.share
