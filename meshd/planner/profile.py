"""What the planner knows of one peer: only what was measured."""

import math
from collections.abc import Iterable, Mapping
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
    """What meshd may still take there, beside what it holds already; idle standby copies of other models are in it."""
    threads: int = 1
    roles: tuple[str, ...] = ("compute", "attention", "storage")
    power_w: float | None = None
    holdings: tuple[Holding, ...] = ()
    """Of the model that is planned, in any state."""
    decode_factor: float = 1.0
    """Measured over predicted decode time, from real traffic (`meshd.planner.model.calibrate`)."""
    prefill_factor: float = 1.0
    hypothetical: bool = False
    """A what-if peer: not here, so not measured."""
    draining: bool = False
    """About to leave: takes no new work."""
    stored: bool = False
    """The model's file lies complete on its disk."""

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


def gives_way(held: Holding) -> bool:
    """A standby copy that no session uses: it goes when an ordinary load needs its memory."""
    return held.standby and held.state == USABLE_STATE and held.kv_tokens_free == held.kv_tokens_total


def profiles_from_adverts(adverts: Iterable[Advert], model: ModelId) -> tuple[PeerProfile, ...]:
    """Profiles for planning `model`, ordered by name, then id."""
    known = list(adverts)
    kv_bytes = {card.id: card.kv_bytes_per_token_layer() for advert in known for card in advert.models}
    profiles = [_profile(advert, model, kv_bytes) for advert in known]
    return tuple(sorted(profiles, key=lambda profile: (profile.name, profile.id)))


def _profile(advert: Advert, model: ModelId, kv_bytes: Mapping[ModelId, int]) -> PeerProfile:
    """`kv_bytes`: of one token in one layer."""
    capability = advert.capability
    yielding = (held for held in advert.holdings if held.model != model and gives_way(held))
    return PeerProfile(
        id=advert.peer,
        name=advert.name,
        rates=capability.rates,
        memory_free_bytes=capability.memory_free_bytes
        + sum(held.weight_bytes + held.kv_tokens_total * len(held.layers) * kv_bytes.get(held.model, 0) for held in yielding),
        threads=capability.threads,
        roles=capability.roles,
        power_w=capability.power_w,
        holdings=tuple(held for held in advert.holdings if held.model == model),
        draining=advert.draining,
        stored=any(card.id == model for card in advert.models),
    )
