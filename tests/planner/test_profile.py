import math

import msgspec
import pytest

from in_process.clusters import MODEL, make_advert, make_card, make_holding, make_peer
from meshd.planner.profile import DEFAULT_OVERHEAD_S, gives_way, profiles_from_adverts
from meshd.types import Holding, LayerRange, LearnedRates, ModelId


def test_profiles_are_ordered_and_have_only_the_models_holdings() -> None:
    other = Holding(model=ModelId("n"), layers=LayerRange(0, 4), state="active")
    a, b = make_peer("a", holdings=(make_holding(0, 4), other), power_w=5.0), make_peer("b", memory=60)
    profiles = profiles_from_adverts([make_advert(b, stored=False), make_advert(a)], MODEL)
    assert [profile.name for profile in profiles] == ["a", "b"]
    assert [profile.stored for profile in profiles] == [True, False]
    assert profiles[0].holdings == (make_holding(0, 4),)
    assert (profiles[1].memory_free_bytes, profiles[1].threads, profiles[0].power_w) == (60, 1, 5.0)


def test_a_peer_with_a_missing_rate_is_not_measured() -> None:
    assert make_peer("a").measured
    for field in ("decode_bytes_s", "prefill_flops_s", "attention_bytes_s"):
        for rate in (0.0, math.inf, math.nan):
            broken = msgspec.structs.replace(make_peer("a").rates, **{field: rate})
            assert not msgspec.structs.replace(make_peer("a"), rates=broken).measured


def test_measured_times_of_two_holdings_are_weighted_by_layers() -> None:
    holdings = (make_holding(0, 3, layer_decode_s=1.0), make_holding(3, 4, layer_decode_s=5.0), make_holding(4, 8))
    assert make_peer("a", holdings=holdings).layer_decode_s == pytest.approx(2.0)


def test_a_peers_corrections_apply_to_contexts_like_the_problems() -> None:
    learned = LearnedRates(decode=(2.0, 3.0, 4.0), prefill=(0.5, 0.75, 1.5, 1.0), step_overhead_s=0.002)
    advert = msgspec.structs.replace(make_advert(make_peer("a")), learned=learned)

    def factors(decode_at: float, prompt_tokens: int) -> tuple[float, float]:
        (profile,) = profiles_from_adverts([advert], MODEL, decode_at=decode_at, prompt_tokens=prompt_tokens)
        assert profile.step_overhead_s == 0.002
        return profile.decode_factor, profile.prefill_factor

    assert factors(140, 128) == (2.0, 0.5)
    assert factors(1512, 1500) == (3.0, 1.5)
    assert factors(5000, 129) == (4.0, 0.75)


def test_a_peer_that_has_learned_nothing_is_not_corrected() -> None:
    (profile,) = profiles_from_adverts([make_advert(make_peer("a"))], MODEL, decode_at=700)
    assert (profile.decode_factor, profile.prefill_factor, profile.step_overhead_s) == (1.0, 1.0, DEFAULT_OVERHEAD_S)


def test_only_active_holdings_are_usable() -> None:
    active, loading = make_holding(0, 4), make_holding(4, 8, state="loading")
    assert make_peer("a", holdings=(loading, active)).usable_holdings == (active,)


def test_only_an_idle_standby_copy_gives_way() -> None:
    assert gives_way(make_holding(0, 4, standby=True))
    assert not gives_way(make_holding(0, 4))
    assert not gives_way(make_holding(0, 4, standby=True, free=4095))
    assert not gives_way(make_holding(0, 4, standby=True, state="loading"))


def test_memory_of_idle_standby_copies_of_other_models_is_free() -> None:
    idle, busy = make_holding(0, 4, kv_tokens=100, standby=True), make_holding(4, 8, standby=True, free=0)
    adverts = [make_advert(make_peer("a", memory=1000, holdings=(idle, busy)))]
    kv_bytes = 100 * 4 * make_card().kv_bytes_per_token_layer()
    assert profiles_from_adverts(adverts, ModelId("other"))[0].memory_free_bytes == 1000 + idle.weight_bytes + kv_bytes
    assert profiles_from_adverts(adverts, MODEL)[0].memory_free_bytes == 1000
