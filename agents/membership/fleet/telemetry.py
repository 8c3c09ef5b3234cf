"""What a peer publishes of itself besides its presence: measurements at a chosen rate, and events.

Whoever may read at the broker reads them, so they have nothing of prompts and answers, no log lines, and no free text of errors.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import psutil

from meshd.agents.observe.events import (
    AnswerContinued,
    Event,
    HoldingChanged,
    LinkRefused,
    PeerChanged,
    PlanChosen,
    PredictionChecked,
    SessionChanged,
)
from meshd.agents.observe.stream import Published

PUBLISHED: dict[type[Event], tuple[str, ...]] = {
    PeerChanged: ("of", "of_name", "state", "was"),
    LinkRefused: ("address", "of"),
    HoldingChanged: ("model", "layers", "state", "was"),
    SessionChanged: ("session", "model", "state", "was", "tokens"),
    PlanChosen: ("session", "epoch", "plan", "predicted_ttft_s", "predicted_tpot_s"),
    AnswerContinued: ("session", "epoch", "plan", "method", "cause", "pause_s"),
    PredictionChecked: ("session", "what", "predicted_s", "measured_s"),
}
"""Kinds of events that are published at the broker, and their fields. A new field must be added here to be published."""
_FIELDS = {str(kind.__struct_config__.tag): frozenset(("at", *fields)) for kind, fields in PUBLISHED.items()}


def event_line(event: Published) -> tuple[str, bytes] | None:
    """Returns: kind and JSON of an event to publish; None if it stays on this device. Other peers publish their own events."""
    if not event.own or (fields := _FIELDS.get(event.kind)) is None:
        return None
    content = {name: value for name, value in msgspec.json.decode(event.line).items() if name in fields}
    return event.kind, msgspec.json.encode(content)


class Meter:
    """Measures this device. A value that the device does not have is absent, so that a reader never takes a guess for it."""

    def __init__(self, tokens: Callable[[], int], peers: Callable[[], int], sessions: Callable[[], int]) -> None:
        """`tokens` counts the tokens of answers that this peer coordinates, `peers` the linked peers, `sessions` those with a stage
        here."""
        self._tokens = tokens
        self._peers = peers
        self._sessions = sessions
        self._before: tuple[int, float] | None = None

    def measure(self, now: float, wall_s: float) -> dict[str, Any]:
        """Returns: the fields of a publication. Rates are over the time since the last call. Reads files of the system."""
        tokens = self._tokens()
        before_tokens, before = self._before or (tokens, now)
        self._before = tokens, now
        memory = psutil.virtual_memory()
        return {
            "at": int(wall_s * 1000),
            "tokens_per_s": round(max(0, tokens - before_tokens) / (now - before), 2) if now > before else 0.0,
            "sessions": self._sessions(),
            "peers": self._peers(),
            "memory_free_bytes": memory.available,
            "memory_used_percent": memory.percent,
            **read_sensors(),
        }


def read_sensors() -> dict[str, float]:
    """Returns: `battery_percent` and `temperature_c` (the hottest sensor), each only where the system has it."""
    found: dict[str, float] = {}
    # psutil has neither function on systems without such sensors.
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is not None:
        found["battery_percent"] = round(battery.percent, 1)
    groups = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    temperatures = [sensor.current for group in groups.values() for sensor in group if 0 < sensor.current < 150]
    if temperatures:
        found["temperature_c"] = round(max(temperatures), 1)
    return found
