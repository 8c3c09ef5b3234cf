"""Correct predictions by measurements: one smoothed ratio per peer and phase, a factor on later predictions."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from meshd.planner.profile import PeerProfile
from meshd.types import PeerId

SMOOTHING = 0.2
"""Weight of the newest sample."""
LEAST, MOST = 0.5, 2.0
"""Bounds of a ratio: beyond them the model is wrong, and a factor would hide that."""
FLAG_BELOW, FLAG_ABOVE = 0.75, 1.33

Phase = Literal["decode", "prefill"]


class Ratio(msgspec.Struct, frozen=True):
    """Measured over predicted time, exponentially weighted."""

    value: float = 1.0
    samples: int = 0

    @property
    def flagged(self) -> bool:
        """Whether predictions for this peer are off enough to report."""
        return self.samples > 0 and not FLAG_BELOW <= self.value <= FLAG_ABOVE

    def observed(self, measured_s: float, predicted_s: float) -> "Ratio":
        """This ratio with one more sample. `predicted_s` excludes any factor; a time of 0 or less changes nothing."""
        if measured_s <= 0 or predicted_s <= 0:
            return self
        sample = _capped(measured_s / predicted_s)
        value = self.value + SMOOTHING * (sample - self.value)
        return Ratio(_capped(value), self.samples + 1)


class Calibration(msgspec.Struct, frozen=True):
    """The ratios of all peers."""

    ratios: dict[tuple[PeerId, Phase], Ratio] = {}

    def ratio(self, peer: PeerId, phase: Phase) -> Ratio:
        return self.ratios.get((peer, phase), Ratio())

    def observed(self, peer: PeerId, phase: Phase, measured_s: float, predicted_s: float) -> "Calibration":
        """These ratios with one more sample."""
        ratio = self.ratio(peer, phase).observed(measured_s, predicted_s)
        return Calibration({**self.ratios, (peer, phase): ratio})

    def without(self, peer: PeerId) -> "Calibration":
        """These ratios without a peer that was probed again or is gone."""
        return Calibration({key: ratio for key, ratio in self.ratios.items() if key[0] != peer})

    def applied(self, profiles: Iterable[PeerProfile]) -> tuple[PeerProfile, ...]:
        """The profiles with these ratios as their factors."""
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
