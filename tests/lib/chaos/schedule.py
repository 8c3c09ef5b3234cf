"""The schedule of faults: their kinds, order and severity follow from the seed. Victims are chosen when a fault begins."""

import enum
import random
from dataclasses import dataclass


class Kind(enum.Enum):
    """The kinds of faults, with their names in the table of results."""

    KILL = "kill -9"
    COORDINATOR = "kill -9 of the coordinator"
    POWER = "power loss"
    FREEZE = "freeze"
    PARTITION = "silent partition"
    ONE_WAY = "one-way cut"
    SLOW = "link 100 times slower"
    GARBAGE = "garbage"
    DRAIN = "SIGTERM (drain)"
    TWO = "two in a row"
    DURING = "loss during recovery"
    REPLACEMENT = "loss of the replacement"
    PREFILL = "loss during prefill"
    MIGRATE = "migration (no fault)"


NETWORK = frozenset({Kind.POWER, Kind.PARTITION, Kind.ONE_WAY, Kind.SLOW})
"""Faults of a host's link: they need hosts in network namespaces."""
DOUBLE = frozenset({Kind.TWO, Kind.DURING, Kind.REPLACEMENT})
"""Faults of two peers. They spare coordinators: an answer whose coordinator and deputy die at once is lost by design."""
_EITHER = frozenset({Kind.POWER, Kind.FREEZE, Kind.PARTITION, Kind.ONE_WAY, Kind.SLOW, Kind.DRAIN})
"""Faults that may hit a coordinator or a stage."""
_COORDINATOR_SHARE = 0.35
GARBAGES = ("nan", "size", "vocabulary", "torn")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the schedule."""

    number: int
    kind: Kind
    coordinator: bool
    """Whether the victim should be a peer that coordinates an answer, not one that computes a stage."""
    seconds: float
    """Duration of the fault, or time until an ended daemon is started again."""
    delay_s: float
    """Time from the first loss to the second, for two losses; time from the start of the prefill, for a loss during prefill."""
    mode: str
    """The direction that is cut, or the kind of garbage. Empty: the kind of fault has no modes."""
    pick: float
    """Random number, at least 0 and less than 1, that selects the victim among the candidates."""

    @property
    def label(self) -> str:
        return self.kind.value + (" of a coordinator" if self.coordinator and self.kind is not Kind.COORDINATOR else "")


def make_schedule(seed: int, count: int, *, network: bool) -> list[Fault]:
    """Return `count` faults, in rounds of all kinds in random order, and one migration more after each round."""
    rng = random.Random(seed)
    kinds = [kind for kind in Kind if kind is not Kind.MIGRATE and (network or kind not in NETWORK)]
    schedule: list[Fault] = []
    faults = 0
    while faults < count:
        rng.shuffle(kinds)
        for kind in [*kinds[: count - faults], Kind.MIGRATE]:
            faults += kind is not Kind.MIGRATE
            schedule.append(_fault(len(schedule) + 1, kind, rng))
    return schedule


def _fault(number: int, kind: Kind, rng: random.Random) -> Fault:
    coordinator = rng.random() < _COORDINATOR_SHARE
    lasts = rng.uniform(3.0, 8.0)
    delay_s = {Kind.DURING: rng.uniform(0.05, 0.3), Kind.TWO: rng.uniform(1.0, 3.0)}.get(kind, rng.uniform(0.05, 0.6))
    direction, garbage, pick = rng.choice(("in", "out")), rng.choice(GARBAGES), rng.random()
    modes = {Kind.ONE_WAY: direction, Kind.GARBAGE: garbage, Kind.PARTITION: "silent"}
    seconds = rng.uniform(1.0, 3.0) if kind not in _EITHER | {Kind.GARBAGE} else lasts
    return Fault(
        number=number,
        kind=kind,
        coordinator=kind is Kind.COORDINATOR or (kind in _EITHER and coordinator),
        seconds=seconds,
        delay_s=delay_s,
        mode=modes.get(kind, ""),
        pick=pick,
    )
