"""Publishes how the layers on this peer change: their states, and the progress of loads."""

from dataclasses import dataclass, field

from meshd.agents.observe.events import HoldingChanged, LoadProgress
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels

STEP = 0.02
"""Progress of a load between two events."""


@dataclass(slots=True)
class HoldingChanges:
    """Compares the layers on this peer with those of the last call."""

    holdings: ResidentModels
    events: EventStream
    _known: dict[int, tuple[ResidentLayers, LoadState, float]] = field(default_factory=dict)
    """Layers by `id()`, with the state and the progress that were published."""

    def changed(self) -> None:
        """Publish what has changed. Called after each change, and several times a second while layers load."""
        present = {id(resident): resident for resident in self.holdings}
        for number, (resident, was, _) in list(self._known.items()):
            if number not in present:
                del self._known[number]
                self._publish(resident, "released", was.value)
        for number, resident in present.items():
            known = self._known.get(number)
            progress = known[2] if known is not None else 0.0
            if known is None or known[1] is not resident.state:
                self._publish(resident, resident.state.value, known[1].value if known is not None else "")
            elif resident.state is LoadState.LOADING and resident.progress - progress < STEP:
                continue
            elif resident.state is LoadState.LOADING:
                layers = str(resident.layers)
                self.events.publish(LoadProgress(model=resident.card.name, layers=layers, progress=resident.progress))
            self._known[number] = resident, resident.state, resident.progress

    def _publish(self, resident: ResidentLayers, state: str, was: str) -> None:
        self.events.publish(HoldingChanged(model=resident.card.name, layers=str(resident.layers), state=state, was=was))
