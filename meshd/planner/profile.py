"""What the planner knows of one peer: only what was measured."""

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from meshd.types import Advert, Holding, ModelId, PeerId, Rates

USABLE_STATE = "active"
"""Of holdings that a new session may be routed over."""


class PeerProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One peer, as the planner sees it for one model."""

    id: PeerId
    name: str
    rates: Rates
    memory_free_bytes: int
    """What meshd may still take there, beside what it holds already."""
    threads: int = 1
    roles: tuple[str, ...] = ("compute", "attention", "storage")
    power_w: float | None = None
    holdings: tuple[Holding, ...] = ()
    """Of the model that is planned, in any state."""
    decode_factor: float = 1.0
    """Measured over predicted decode time, from real traffic (`meshd.planner.calibrate`)."""
    prefill_factor: float = 1.0
    hypothetical: bool = False
    """A what-if peer: not here, so not measured."""

    @property
    def measured(self) -> bool:
        """Whether every rate that a prediction divides by is known."""
        rates = self.rates
        divisors = (rates.decode_bytes_s, rates.prefill_flops_s, rates.attention_bytes_s)
        return all(math.isfinite(rate) and rate > 0 for rate in divisors)

    @property
    def layer_decode_s(self) -> float | None:
        """One layer, one token, short context, as measured on what it holds; None: not measured."""
        return self._measured("layer_decode_s")

    @property
    def layer_prefill_s(self) -> float | None:
        """One layer, per token of a prefill chunk; None: not measured."""
        return self._measured("layer_prefill_s")

    @property
    def head_s(self) -> float | None:
        """Final norm, head and sampler for one token; None: not measured."""
        return self._measured("head_s")

    @property
    def usable_holdings(self) -> tuple[Holding, ...]:
        """Those that a new session may be routed over now."""
        return tuple(held for held in self.holdings if held.state == USABLE_STATE)

    def _measured(self, field: Literal["layer_decode_s", "layer_prefill_s", "head_s"]) -> float | None:
        samples = [(len(held.layers), getattr(held, field)) for held in self.holdings]
        known = [(layers, seconds) for layers, seconds in samples if seconds is not None and seconds > 0]
        if not known:
            return None
        return float(sum(layers * seconds for layers, seconds in known) / sum(layers for layers, _ in known))


def profiles_from_adverts(adverts: Iterable[Advert], model: ModelId) -> tuple[PeerProfile, ...]:
    """Profiles for planning `model`, ordered by name, then id."""
    profiles = [_profile(advert, model) for advert in adverts]
    return tuple(sorted(profiles, key=lambda profile: (profile.name, profile.id)))


def _profile(advert: Advert, model: ModelId) -> PeerProfile:
    capability = advert.capability
    return PeerProfile(
        id=advert.peer,
        name=advert.name,
        rates=capability.rates,
        memory_free_bytes=capability.memory_free_bytes,
        threads=capability.threads,
        roles=capability.roles,
        power_w=capability.power_w,
        holdings=tuple(held for held in advert.holdings if held.model == model),
    )
