"""What the planner knows about a peer. All rates and times are measured, except those of what-if peers."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from meshd.numerics import UNKNOWN, NumericsId
from meshd.types import Advert, Holding, ModelId, PeerId, Rates

USABLE_STATE = "active"
"""State in which a holding can serve new sessions."""
PREFILL_CHUNK_TOKENS = 128
"""Number of tokens in a prefill chunk. It is equal in all plans.

The last bits of results may depend on the size of chunks, and they must not depend on the plan.
"""
CONTEXT_CLASSES = (512, 4096)
"""Positions at which a class of contexts ends. A peer learns about each class separately: the share of attention grows with it."""
LEAST_FACTOR, MOST_FACTOR = 0.25, 8.0
"""Bounds of a factor. Eight: a thread that shares its core with seven others."""
DEFAULT_OVERHEAD_S = 400e-6
"""Overhead of a step before it is measured. `bench_split.py` measured 0.8 ms for a second stage, two hops included."""


def context_class(position: float) -> int:
    """Return the index of the class of contexts that this position belongs to."""
    return sum(position >= end for end in CONTEXT_CLASSES)


def prefill_class(position: float, *, is_whole: bool) -> int:
    """Return the index of the class of a prefill chunk at `position`. `is_whole`: whether the chunk is the whole prompt.

    A prompt of one chunk has a class of its own: the stages compute the chunks of longer ones at the same time, and may share
    processors and memory.
    """
    return 0 if is_whole else 1 + context_class(position)


def factor_of(factors: tuple[float, ...], place: int) -> float:
    """Return the advertised factor of a class, within the bounds; 1 if there is none."""
    return min(MOST_FACTOR, max(LEAST_FACTOR, factors[place])) if place < len(factors) else 1.0


_Measured = Literal["layer_decode_s", "layer_prefill_s", "head_s", "attention_token_s", "attention_pair_s"]


class PeerProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A peer, as the planner sees it for one model."""

    id: PeerId
    name: str
    rates: Rates
    memory_free_bytes: int
    """Memory that meshd may still use on the peer. Idle standby copies of other models count as free."""
    numerics: NumericsId = UNKNOWN
    """How the peer computes. Peers with equal ids compute equal bits."""
    threads: int = 1
    roles: tuple[str, ...] = ("compute", "attention", "storage")
    power_w: float | None = None
    holdings: tuple[Holding, ...] = ()
    """Holdings of the planned model, in any state."""
    decode_factor: float = 1.0
    """Measured over predicted compute time of the peer's recent decode steps at contexts like the problem's."""
    prefill_factor: float = 1.0
    step_overhead_s: float = 0.0
    """Time of a step on the peer beside its computation."""
    hypothetical: bool = False
    """True for a what-if peer, whose rates are assumed."""
    weight_bits: dict[str, float] = {}
    """Bits that a weight of each kind takes in the memory of the peer's backend. Empty: as many as in the file."""
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
    def attention_token_s(self) -> float | None:
        """Seconds of one layer's attention in a decode step, for each position. None: not measured."""
        return self._measured("attention_token_s")

    @property
    def attention_pair_s(self) -> float | None:
        """Seconds of one layer's attention in a prefill chunk, for each pair of positions. None: not measured."""
        return self._measured("attention_pair_s")

    @property
    def usable_holdings(self) -> tuple[Holding, ...]:
        """The holdings that can serve new sessions now."""
        return tuple(holding for holding in self.holdings if holding.state == USABLE_STATE)

    def _measured(self, field: _Measured) -> float | None:
        samples = [(len(holding.layers), getattr(holding, field)) for holding in self.holdings]
        known = [(layers, seconds) for layers, seconds in samples if seconds is not None and seconds > 0]
        if not known:
            return None
        return float(sum(layers * seconds for layers, seconds in known) / sum(layers for layers, _ in known))


def gives_way(holding: Holding) -> bool:
    """Whether the holding is an idle standby copy, which is unloaded when another load needs its memory."""
    return holding.standby and holding.state == USABLE_STATE and holding.kv_tokens_free == holding.kv_tokens_total


def profiles_from_adverts(
    adverts: Iterable[Advert], model: ModelId, *, decode_at: float = 0.0, prompt_tokens: int = 0
) -> tuple[PeerProfile, ...]:
    """Make the profiles of the peers in `adverts` for planning `model`, ordered by name, then id.

    `decode_at`: mean position of the decode steps to plan for. The peers' corrections for such contexts and prompts are applied.
    """
    known = list(adverts)
    kv_bytes = {card.id: card.kv_bytes_per_token_layer() for advert in known for card in advert.models}
    profiles = [_profile(advert, model, kv_bytes, decode_at, prompt_tokens) for advert in known]
    return tuple(sorted(profiles, key=lambda profile: (profile.name, profile.id)))


def _profile(advert: Advert, model: ModelId, kv_bytes: Mapping[ModelId, int], decode_at: float, prompt_tokens: int) -> PeerProfile:
    """Make the profile of one peer. `kv_bytes`: bytes of K and V of one token in one layer, by model."""
    capability, overhead_s = advert.capability, advert.learned.step_overhead_s
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
        numerics=capability.numerics,
        threads=capability.threads,
        roles=capability.roles,
        power_w=capability.power_w,
        weight_bits=capability.weight_bits,
        holdings=tuple(holding for holding in advert.holdings if holding.model == model),
        decode_factor=factor_of(advert.learned.decode, context_class(decode_at)),
        prefill_factor=factor_of(
            advert.learned.prefill, prefill_class(prompt_tokens / 2, is_whole=prompt_tokens <= PREFILL_CHUNK_TOKENS)
        ),
        step_overhead_s=DEFAULT_OVERHEAD_S if overhead_s is None else overhead_s,
        draining=advert.draining,
        stored=any(card.id == model for card in advert.models),
    )
