"""Correct predictions with measurements.

For each peer and phase, the ratio of measured to predicted time is smoothed exponentially and multiplies later predictions. The
method and its constants come from no paper and no measurement.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from meshd.planner.profile import PeerProfile
from meshd.types import PeerId

SMOOTHING = 0.2
"""Weight of the newest sample in a ratio."""
LEAST, MOST = 0.5, 2.0
"""Bounds of a ratio. A ratio beyond them means that the cost model is wrong, which a correction would hide."""
FLAG_BELOW, FLAG_ABOVE = 0.75, 1.33
"""Bounds beyond which a ratio is flagged: predictions are a third too long, or a quarter too short."""

Phase = Literal["decode", "prefill"]


class Ratio(msgspec.Struct, frozen=True):
    """Ratio of measured to predicted time, an exponentially weighted mean."""

    value: float = 1.0
    samples: int = 0

    @property
    def flagged(self) -> bool:
        """Whether the ratio is beyond the bounds for flagging."""
        return self.samples > 0 and not FLAG_BELOW <= self.value <= FLAG_ABOVE

    def observed(self, measured_s: float, predicted_s: float) -> "Ratio":
        """Return the ratio with one more sample; unchanged if a time is 0 or less. `predicted_s`: before correction."""
        if measured_s <= 0 or predicted_s <= 0:
            return self
        sample = _capped(measured_s / predicted_s)
        value = self.value + SMOOTHING * (sample - self.value)
        return Ratio(_capped(value), self.samples + 1)


class Calibration(msgspec.Struct, frozen=True):
    """The ratios of all peers and phases. A missing ratio is 1."""

    ratios: dict[tuple[PeerId, Phase], Ratio] = {}

    def ratio(self, peer: PeerId, phase: Phase) -> Ratio:
        return self.ratios.get((peer, phase), Ratio())

    def observed(self, peer: PeerId, phase: Phase, measured_s: float, predicted_s: float) -> "Calibration":
        """Return the ratios with one more sample for a peer and phase."""
        ratio = self.ratio(peer, phase).observed(measured_s, predicted_s)
        return Calibration({**self.ratios, (peer, phase): ratio})

    def without(self, peer: PeerId) -> "Calibration":
        """Return the ratios without those of `peer`, which was probed again or has left."""
        return Calibration({key: ratio for key, ratio in self.ratios.items() if key[0] != peer})

    def applied(self, profiles: Iterable[PeerProfile]) -> tuple[PeerProfile, ...]:
        """Return the profiles with these ratios as `decode_factor` and `prefill_factor`."""
        return tuple(
            msgspec.structs.replace(
                profile,
                decode_factor=self.ratio(profile.id, "decode").value,
                prefill_factor=self.ratio(profile.id, "prefill").value,
            )
            for profile in profiles
        )


def _capped(value: float) -> float:
    return min(MOST, max(LEAST, value))
