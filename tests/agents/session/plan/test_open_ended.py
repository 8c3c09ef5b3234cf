"""First plans of answers whose length nobody asked for."""

import msgspec
import pytest

from in_process.clusters import make_card, make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import NO_OPTIONS
from meshd.agents.session.plan.open_ended import LEAST_ANSWER, placed_kv, plan_open_ended
from meshd.errors import DoesNotFit, Overloaded
from meshd.types import Plan

SHORT = make_card()
LONG = msgspec.structs.replace(SHORT, spec=msgspec.structs.replace(SHORT.spec, context_length=131_072))
"""The same model with a context that no peer of these tests has memory for: KV of 46 KiB a token takes 6 GB."""
PROMPT = 100
SMALL = 1 << 30


async def planned(cluster: Cluster, least_tokens: int = LEAST_ANSWER, prompt: int = PROMPT) -> Plan:
    rest = LONG.spec.context_length - prompt
    return await plan_open_ended(cluster.router, LONG, NO_OPTIONS, prompt_tokens=prompt, max_tokens=rest, least_tokens=least_tokens)


async def test_a_model_that_is_not_placed_is_placed_with_kv_for_a_usual_context() -> None:
    cluster = Cluster(make_peer("a", memory=SMALL))
    plan = await planned(cluster)
    ((_, place),) = cluster.asked
    assert 8192 <= place.kv_tokens <= 16_384
    assert plan.context == PROMPT + place.kv_tokens // 4


async def test_an_explicit_length_that_does_not_fit_is_refused_with_the_missing_memory() -> None:
    cluster = Cluster(make_peer("a", memory=SMALL))
    with pytest.raises(DoesNotFit, match="missing"):
        await cluster.router.plan_for(LONG, NO_OPTIONS, prompt_tokens=PROMPT, max_tokens=131_072 - PROMPT)


async def test_an_answer_takes_its_share_of_the_kv_that_is_placed() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 30, kv_tokens=16_384),)))
    assert (await planned(cluster)).context == PROMPT + 4096
    assert (await planned(cluster, prompt=12_000)).context == 12_000 + 4096
    assert not cluster.asked


async def test_the_stage_with_the_least_kv_decides() -> None:
    parts = (make_holding(0, 10, kv_tokens=16_384), make_holding(10, 30, kv_tokens=4096, free=2000))
    cluster = Cluster(*(make_peer(name, holdings=(part,)) for name, part in zip("ab", parts, strict=True)))
    assert placed_kv(cluster.live(), LONG) == (4096, 2000)
    assert (await planned(cluster)).context == PROMPT + 1024


@pytest.mark.parametrize("free", [PROMPT + LEAST_ANSWER, 1500, 4000])
async def test_an_answer_is_limited_to_the_kv_that_is_free(free: int) -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 30, kv_tokens=16_384, free=free),)))
    assert (await planned(cluster)).context == free


async def test_an_answer_waits_rather_than_be_very_short_but_not_for_ever() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 30, kv_tokens=16_384, free=PROMPT + 10),)))
    with pytest.raises(Overloaded):
        await planned(cluster)
    assert (await planned(cluster, least_tokens=1)).context == PROMPT + 10


async def test_no_kv_for_the_prompt_itself_is_still_an_error() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 30, kv_tokens=16_384, free=PROMPT),)))
    with pytest.raises(Overloaded):
        await planned(cluster, least_tokens=1)


async def test_layers_that_are_missing_count_as_no_kv() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 29),)))
    assert placed_kv(cluster.live(), LONG) == (0, 0)
