"""Counts what the stages on this peer compute, and publishes it once a second while somebody reads events."""

from dataclasses import dataclass, field

from meshd.agents.observe.events import MAX_STAGES, StageWork, Work
from meshd.agents.observe.stream import EventStream
from meshd.clock import Clock
from meshd.telemetry import Phase

PERIOD_S = 1.0


@dataclass(slots=True)
class _Counts:
    """The work of one stage in one phase since the last event."""

    model: str
    layers: str
    steps: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    sent_bytes: int = 0


@dataclass(slots=True)
class WorkMeter:
    """Adds up the steps of all stages. Without readers it counts nothing, so that a step costs nothing then."""

    events: EventStream
    clock: Clock
    _counts: dict[tuple[str, int, Phase], _Counts] = field(default_factory=dict)

    async def run(self) -> None:
        """Publish the work of each period until cancelled."""
        began = self.clock.monotonic()
        while True:
            await self.clock.sleep(PERIOD_S)
            now = self.clock.monotonic()
            self.publish(now - began)
            began = now

    def add(
        self, session: str, stage: int, phase: Phase, *, model: str, layers: str, tokens: int, busy_s: float, sent_bytes: int
    ) -> None:
        """Count one computed step. `sent_bytes`: size of the activation that it gave to the next stage."""
        if not (self.events.readers or self.events.watchers):
            return
        counts = self._counts.get((session, stage, phase))
        if counts is None:
            counts = self._counts[session, stage, phase] = _Counts(model, layers)
        counts.steps += 1
        counts.tokens += tokens
        counts.busy_s += busy_s
        counts.sent_bytes += sent_bytes

    def publish(self, period_s: float) -> None:
        """Publish what was counted since the last call, if anything was. Stages beyond `MAX_STAGES` count in the sums only."""
        if not self._counts:
            return
        counted, self._counts = self._counts, {}
        busiest = sorted(counted.items(), key=lambda item: item[1].busy_s, reverse=True)
        stages = tuple(
            StageWork(
                session=session,
                stage=stage,
                phase=phase,
                model=counts.model,
                layers=counts.layers,
                steps=counts.steps,
                tokens=counts.tokens,
                busy_s=counts.busy_s,
                sent_bytes=counts.sent_bytes,
            )
            for (session, stage, phase), counts in busiest[:MAX_STAGES]
        )
        everything = counted.values()
        self.events.publish(
            Work(
                period_s=period_s,
                steps=sum(counts.steps for counts in everything),
                tokens=sum(counts.tokens for (_, _, phase), counts in counted.items() if phase == "decode"),
                busy_s=sum(counts.busy_s for counts in everything),
                stages=stages,
            )
        )
