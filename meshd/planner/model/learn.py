"""Learn from real steps how far a peer's times are from the predicted ones, because other work shares its processor.

Each error is corrected in one place only:

    computing    the stage's peer compares each step with the formulas of `cost`, and advertises factors (here)
    overhead     the stage's peer measures what a step takes beside its computation, and advertises it (here)
    network      both ends of a link measure it, and advertise it (`agents/links/estimate.py`)

The coordinator only adds these up. It measures whole tokens and reports the error, but corrects nothing by it.

The method: a factor is the mean of measured over predicted time, weighted exponentially, over about `MEMORY_S` seconds of
computing. A step that took over `OUTLIER` times as long as usual counts as this many times. If the mean over the last `FRESH_S` is
smaller by `FASTER`, other work has ended, and the factor takes that mean: a short disturbance makes steps longer, never shorter.

The factor of prompts of one chunk is a median, because each of them gives one sample only. After `GRACE_S` without steps a factor
returns to 1, half of the way in each `HALF_LIFE_S`: the load that it was learned under may have ended. Constants were chosen with
the steps that `bench_predictions.py` makes.
"""

import math
import statistics
from typing import Literal

import msgspec

from meshd.planner.profile import CONTEXT_CLASSES, DEFAULT_OVERHEAD_S, LEAST_FACTOR, MOST_FACTOR
from meshd.types import LearnedRates

MEMORY_S, FRESH_S = 4.0, 1.0
"""Seconds of computing after which a mean has forgotten two thirds of what it was before."""
FASTER = 1.25
"""Ratio of the two means from which on steps have become faster."""
TYPICAL_OF = 5
"""Prompts of one chunk that their median is taken over."""
GRACE_S, HALF_LIFE_S = 30.0, 60.0
OUTLIER = 4.0
"""On a busy machine single steps take several times as long as most, and a client waits for these too."""
MOST_OVERHEAD_S = 0.05
_OVERHEAD_WEIGHT = 0.1

Phase = Literal["decode", "prefill"]


class _Learned(msgspec.Struct, frozen=True):
    """Measured over predicted time of one kind of step, at the time of its last sample."""

    value: float = 1.0
    samples: float = 0.0
    """Number of samples; older ones count less."""
    at: float = -math.inf
    """Monotonic time of the last sample, in seconds."""

    def trust(self, now: float) -> float:
        """Return how much the factor still counts, from 1 at a sample down to 0."""
        return math.pow(0.5, max(0.0, now - self.at - GRACE_S) / HALF_LIFE_S)

    def current(self, now: float) -> float:
        """Return the factor after its decay towards 1."""
        return math.pow(self.value, self.trust(now))


class Factor(_Learned, frozen=True):
    """The mean of many samples."""

    fresh: float = 1.0
    """The mean over the last `FRESH_S`."""

    def observed(self, measured_s: float, predicted_s: float, now: float) -> "Factor":
        """Return the factor with one more sample; unchanged if a time is not positive. `predicted_s`: without any correction."""
        if not _usable(measured_s, predicted_s):
            return self
        trust, samples = self.trust(now), self.samples * self.trust(now)
        fresh, value = math.pow(self.fresh, trust), math.pow(self.value, trust)
        sample = _capped(min(max(measured_s / predicted_s, fresh / OUTLIER), fresh * OUTLIER))
        fresh += _weight(measured_s, FRESH_S, samples) * (sample - fresh)
        value += _weight(measured_s, MEMORY_S, samples) * (sample - value)
        if fresh * FASTER < value:
            value = fresh
        return Factor(_capped(value), samples + 1, now, _capped(fresh))


class Typical(_Learned, frozen=True):
    """The median of a few samples. Before there are several, the lower of two counts: other work only makes steps longer."""

    ratios: tuple[float, ...] = (1.0,)
    """The latest samples, after the value without any."""

    def observed(self, measured_s: float, predicted_s: float, now: float) -> "Typical":
        """As `Factor.observed`."""
        if not _usable(measured_s, predicted_s):
            return self
        known = self.ratios if self.trust(now) > 0.5 else (self.current(now),)
        ratios = (*known, _capped(measured_s / predicted_s))[-TYPICAL_OF:]
        return Typical(statistics.median_low(ratios), self.samples + 1, now, ratios)


class StepLearner:
    """The factors of one peer, by phase and class of contexts or prompts, and the overhead of its steps."""

    def __init__(self) -> None:
        contexts = len(CONTEXT_CLASSES) + 1
        self._factors: dict[Phase, list[Factor | Typical]] = {
            "decode": [Factor()] * contexts,
            "prefill": [Typical(), *[Factor()] * contexts],
        }
        self._overhead = _Learned()
        self._rows = Factor()

    def observe_rows(self, measured_s: float, predicted_s: float, now: float) -> None:
        """Add what the further steps of one pass took beside the first. `predicted_s`: by `cost`, without any correction."""
        self._rows = self._rows.observed(max(measured_s, LEAST_FACTOR * predicted_s), predicted_s, now)

    def rows_factor(self, now: float) -> float:
        """Return the present factor of the further steps of a pass."""
        return self._rows.current(now)

    def observe(self, phase: Phase, place: int, measured_s: float, predicted_s: float, now: float) -> None:
        """Add the computation of one step.

        `place`: index of its class, `context_class` or `prefill_class`. `predicted_s`: by `cost`, without any correction.
        """
        factors = self._factors[phase]
        factors[place] = factors[place].observed(measured_s, predicted_s, now)

    def observe_overhead(self, seconds: float, now: float) -> None:
        """Add what one step took beside its computation."""
        before = self._overhead
        scale = before.current(now)
        sample = min(max(seconds / DEFAULT_OVERHEAD_S, scale / OUTLIER), scale * OUTLIER)
        weight = max(_OVERHEAD_WEIGHT, 1 / (1 + before.samples * before.trust(now)))
        value = min(scale + weight * (sample - scale), MOST_OVERHEAD_S / DEFAULT_OVERHEAD_S)
        self._overhead = _Learned(max(value, 0.01), before.samples * before.trust(now) + 1, now)

    def factor(self, phase: Phase, place: int, now: float) -> float:
        """Return the present factor of a class of steps."""
        return self._factors[phase][place].current(now)

    def learned(self, now: float) -> LearnedRates:
        """Return the present factors and overhead, for the advert."""
        return LearnedRates(
            decode=self._current("decode", now),
            prefill=self._current("prefill", now),
            step_overhead_s=DEFAULT_OVERHEAD_S * self._overhead.current(now) if self._overhead.samples else None,
        )

    def _current(self, phase: Phase, now: float) -> tuple[float, ...]:
        """Return a factor for each class; none without any step. The latest class stands in for those without recent steps."""
        factors = self._factors[phase]
        newest = max(factors, key=lambda factor: factor.at)
        if not newest.samples:
            return ()
        return tuple(factor.current(now) * newest.current(now) ** (1 - factor.trust(now)) for factor in factors)


def _usable(measured_s: float, predicted_s: float) -> bool:
    return 0 < measured_s < math.inf and 0 < predicted_s < math.inf


def _weight(step_s: float, memory_s: float, samples: float) -> float:
    """Return the weight of a step of `step_s` beside `samples` earlier ones."""
    return max(1 - math.exp(-step_s / memory_s), 1 / (1 + samples))


def _capped(value: float) -> float:
    return min(MOST_FACTOR, max(LEAST_FACTOR, value))
