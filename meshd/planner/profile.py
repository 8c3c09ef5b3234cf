"""What the planner knows about a peer. All rates and times are measured, except those of what-if peers."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from meshd.types import Advert, Holding, ModelId, PeerId, Rates

USABLE_STATE = "active"
"""State in which a holding can serve new sessions."""


class PeerProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A peer, as the planner sees it for one model."""

    id: PeerId
    name: str
    rates: Rates
    memory_free_bytes: int
    """Memory that meshd may still use on the peer. Idle standby copies of other models count as free."""
    threads: int = 1
    roles: tuple[str, ...] = ("compute", "attention", "storage")
    power_w: float | None = None
    holdings: tuple[Holding, ...] = ()
    """Holdings of the planned model, in any state."""
    decode_factor: float = 1.0
    """Ratio of measured to predicted decode time in real traffic; see `meshd.planner.model.calibrate`."""
    prefill_factor: float = 1.0
    hypothetical: bool = False
    """True for a what-if peer, whose rates are assumed."""
    draining: bool = False
    """The peer is about to leave and takes no new work."""
    stored: bool = False
    """The model's file is complete on the peer's disk."""

    @property
    def measured(self) -> bool:
        """Whether every rate that a prediction divides by is known and positive."""
        rates = self.rates
        divisors = (rates.decode_bytes_s, rates.prefill_flops_s, rates.attention_bytes_s)
        return all(math.isfinite(rate) and rate > 0 for rate in divisors)

    @property
    def layer_decode_s(self) -> float | None:
        """Seconds of one layer for one token at a short context, measured on the peer's holdings. None: not measured."""
        return self._measured("layer_decode_s")

    @property
    def layer_prefill_s(self) -> float | None:
        """Seconds of one layer for each token of a prefill chunk. None: not measured."""
        return self._measured("layer_prefill_s")

    @property
    def head_s(self) -> float | None:
        """Seconds of final norm, head and sampler for one token. None: not measured."""
        return self._measured("head_s")

    @property
    def usable_holdings(self) -> tuple[Holding, ...]:
        """The holdings that can serve new sessions now."""
        return tuple(holding for holding in self.holdings if holding.state == USABLE_STATE)

    def _measured(self, field: Literal["layer_decode_s", "layer_prefill_s", "head_s"]) -> float | None:
        samples = [(len(holding.layers), getattr(holding, field)) for holding in self.holdings]
        known = [(layers, seconds) for layers, seconds in samples if seconds is not None and seconds > 0]
        if not known:
            return None
        return float(sum(layers * seconds for layers, seconds in known) / sum(layers for layers, _ in known))


def gives_way(holding: Holding) -> bool:
    """Whether the holding is an idle standby copy, which is unloaded when another load needs its memory."""
    return holding.standby and holding.state == USABLE_STATE and holding.kv_tokens_free == holding.kv_tokens_total


def profiles_from_adverts(adverts: Iterable[Advert], model: ModelId) -> tuple[PeerProfile, ...]:
    """Make the profiles of the peers in `adverts` for planning `model`, ordered by name, then id."""
    known = list(adverts)
    kv_bytes = {card.id: card.kv_bytes_per_token_layer() for advert in known for card in advert.models}
    profiles = [_profile(advert, model, kv_bytes) for advert in known]
    return tuple(sorted(profiles, key=lambda profile: (profile.name, profile.id)))


def _profile(advert: Advert, model: ModelId, kv_bytes: Mapping[ModelId, int]) -> PeerProfile:
    """Make the profile of one peer. `kv_bytes`: bytes of K and V of one token in one layer, by model."""
    capability = advert.capability
    idle_copies = [holding for holding in advert.holdings if holding.model != model and gives_way(holding)]
    return PeerProfile(
        id=advert.peer,
        name=advert.name,
        rates=capability.rates,
        memory_free_bytes=capability.memory_free_bytes
        + sum(
            holding.weight_bytes + holding.kv_tokens_total * len(holding.layers) * kv_bytes.get(holding.model, 0)
            for holding in idle_copies
        ),
        threads=capability.threads,
        roles=capability.roles,
        power_w=capability.power_w,
        holdings=tuple(holding for holding in advert.holdings if holding.model == model),
        draining=advert.draining,
        stored=any(card.id == model for card in advert.models),
    )
