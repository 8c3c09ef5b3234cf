"""Sampling: filters, penalties, and that every peer picks the same token."""

import collections
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logits import SHAPES, shaped_logits
from meshd.errors import InvalidRequest, LocalFault
from meshd.kernels.sampling.sampler import PickRequest, Sampler, needs_past_tokens, pick_rows, uniform
from meshd.types import SamplingParams

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.5], np.float32)


def pick(logits: np.ndarray = LOGITS, position: int = 0, **params: object) -> int:
    return Sampler(SamplingParams(**params)).pick(np.asarray(logits, np.float32), position)[0]


def drawn(count: int = 2000, logits: np.ndarray = LOGITS, **params: object) -> collections.Counter[int]:
    sampler = Sampler(SamplingParams(**params))
    return collections.Counter(sampler.pick(logits, position)[0] for position in range(count))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_greedy_picks_the_largest_logit_and_of_equal_ones_the_lowest_id() -> None:
    assert pick(temperature=0) == 1


def test_draws_follow_the_distribution() -> None:
    counts = drawn(20000, temperature=0.7, seed=5)
    expected = softmax(LOGITS / 0.7)
    for token, chance in enumerate(expected):
        assert abs(counts[token] / 20000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 20000) + 1e-9


def test_a_draw_depends_only_on_seed_and_position() -> None:
    one = [pick(position=p, seed=42) for p in range(50)]
    assert one == [pick(position=p, seed=42) for p in range(50)]
    assert one != [pick(position=p, seed=43) for p in range(50)]
    late = Sampler(SamplingParams(seed=42))
    assert [late.pick(LOGITS, p)[0] for p in (49, 7)] == [one[49], one[7]]


def test_the_generator_is_the_same_on_every_device() -> None:
    """Golden values: with another generator, peers of two versions would pick different tokens."""
    assert [round(uniform(0, 0), 12), round(uniform(1, 2), 12), round(uniform(-1, 1 << 20), 12)] == [
        0.011546754286,
        0.94567752206,
        0.533316924119,
    ]


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 2**40))
def test_a_number_is_the_first_that_the_generator_of_numpy_gives(seed: int, position: int) -> None:
    raw = np.random.Philox(key=seed % (1 << 64), counter=position << 64).random_raw()
    assert uniform(seed, position) == (int(raw) >> 11) * 2.0**-53


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    values = [uniform(seed, position) for seed in range(30) for position in range(30)]
    assert len(set(values)) == 900
    assert abs(np.mean(values) - 0.5) < 0.05


def test_top_k_keeps_the_likeliest_and_of_equal_ones_the_lowest_ids() -> None:
    assert set(drawn(top_k=1, temperature=2.0)) == {1}
    assert set(drawn(top_k=2)) == {1, 3}
    assert set(drawn(top_k=3)) == {1, 2, 3}
    assert set(drawn(top_k=2, logits=np.zeros(6, np.float32))) == {0, 1}
    assert len(drawn(top_k=100, temperature=3.0)) == 6


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    share = softmax(LOGITS)
    assert set(drawn(top_p=float(share[1]) * 0.99)) == {1}
    assert set(drawn(top_p=float(share[1]) * 1.01)) == {1, 3}
    assert set(drawn(top_p=1e-9)) == {1}


def test_top_p_counts_within_top_k() -> None:
    assert set(drawn(top_k=2, top_p=0.4)) == {1}
    assert set(drawn(top_k=2, top_p=0.6)) == {1, 3}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert set(drawn(min_p=0.9)) == {1, 3}
    assert set(drawn(min_p=math.exp(-1.01))) == {1, 2, 3}
    assert set(drawn(min_p=1.0)) == {1, 3}


@given(
    seed=st.integers(0, 1000),
    vocab=st.integers(1, 1500),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.999]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
)
@settings(deadline=None, max_examples=60)
def test_top_p_agrees_with_its_definition(seed: int, vocab: int, top_p: float, temperature: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(vocab).astype(np.float32)
    chances = softmax(logits.astype(np.float64) / temperature)
    order = np.lexsort((np.arange(vocab), -chances))
    kept = order[: int(np.searchsorted(np.cumsum(chances[order]), top_p)) + 1]
    assert set(drawn(30, logits, top_p=top_p, temperature=temperature, seed=seed)) <= set(kept.tolist())


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.4, frequency_penalty=0.7), prompt_ids=[1, 1])
    picks = []
    for position in range(4):
        picks.append(sampler.pick(LOGITS, position)[0])
        sampler.accept(picks[-1])
    assert picks == [1, 3, 2, 1]


def test_the_repetition_penalty_counts_each_token_of_prompt_and_answer_once() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt_ids=[1, 1, 4])
    assert sampler.pick(LOGITS, 0)[0] == 3
    sampler.accept(3)
    assert sampler.pick(LOGITS, 1)[0] == 2
    negative = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt_ids=[0])
    assert negative.pick(np.array([-1.0, -1.5], np.float32), 0)[0] == 1


def test_given_answer_tokens_count_like_picked_ones() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.4, frequency_penalty=0.7, repetition_penalty=1.5)
    one = Sampler(params, prompt_ids=[2])
    picks = []
    for position in range(6):
        picks.append(one.pick(LOGITS, position)[0])
        one.accept(picks[-1])
    for count in range(6):
        other = Sampler(params, prompt_ids=[2], answer_ids=picks[:count])
        assert other.pick(LOGITS, count)[0] == picks[count]


@pytest.mark.parametrize(
    ("params", "answered", "needed"),
    [
        ({}, 9, False),
        ({"repetition_penalty": 1.1}, 0, True),
        ({"presence_penalty": 1.0}, 0, False),
        ({"presence_penalty": 1.0}, 1, True),
        ({"frequency_penalty": -1.0}, 1, True),
    ],
)
def test_past_tokens_are_needed_for_a_penalty(params: dict[str, float], answered: int, needed: bool) -> None:
    assert needs_past_tokens(SamplingParams(**params), answered) is needed


def test_bias_is_added() -> None:
    assert pick(temperature=0, logit_bias={4: 100.0}) == 4
    assert pick(temperature=0, logit_bias={1: -100.0}) == 3
    with pytest.raises(InvalidRequest, match="logit_bias names token 6"):
        pick(logit_bias={6: 1.0})


def test_logits_are_not_modified() -> None:
    logits = LOGITS.copy()
    logits.flags.writeable = False
    sampler = Sampler(SamplingParams(repetition_penalty=1.3, logprobs=2, logit_bias={1: 1.0}), prompt_ids=[1])
    sampler.pick(logits, 0)
    assert np.array_equal(logits, LOGITS)


def test_logprobs_are_taken_before_temperature_and_filters() -> None:
    sampler = Sampler(SamplingParams(temperature=0.1, top_k=1, logit_bias={0: 50.0}, logprobs=3))
    token, logprobs = sampler.pick(LOGITS, 0)
    expected = np.log(softmax(LOGITS))
    assert token == 0
    assert logprobs is not None
    assert logprobs.chosen == pytest.approx(expected[0])
    assert [id_ for id_, _ in logprobs.top] == [1, 3, 2]
    assert [value for _, value in logprobs.top] == pytest.approx([expected[1], expected[3], expected[2]])


def test_logprobs_0_returns_that_of_the_chosen_token_only() -> None:
    logprobs = Sampler(SamplingParams(temperature=0, logprobs=0)).pick(LOGITS, 0)[1]
    assert logprobs is not None
    assert logprobs.top == ()
    assert Sampler(SamplingParams()).pick(LOGITS, 0)[1] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(LocalFault, match="at 7: the logits hold NaN or infinity"):
        Sampler(SamplingParams(temperature=temperature)).pick(logits, 7)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_are_finite(temperature: float) -> None:
    assert 0 <= pick(temperature=temperature, top_p=0.9) < 6


def plain_draw(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """The definition without shortcuts: sort the whole vocabulary, keep the candidates, draw by their cumulated weights."""
    ids = np.arange(len(logits))
    if params.top_k:
        ids = np.sort(np.lexsort((ids, -logits))[: params.top_k])
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits[ids] - logits.max()) / np.float32(params.temperature))
    weights = ((weights + np.float32(2**-11)) - np.float32(2**-11)).astype(np.float64)  # multiples of 2^-34: all sums are exact
    ranked = np.lexsort((ids, -weights))
    if params.top_p < 1:
        ranked = ranked[: int(np.searchsorted(np.cumsum(weights[ranked]), params.top_p * weights.sum())) + 1]
    kept = np.sort(ranked[weights[ranked] >= np.float32(params.min_p)])
    sums = np.cumsum(weights[kept])
    target = min(uniform(params.seed, position) * sums[-1], np.nextafter(sums[-1], 0))
    return int(ids[kept][np.searchsorted(sums, target, side="right")])


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 2, 7, 300, 1000, 4097, 20_000]),
    shape=st.sampled_from(sorted(SHAPES)),
    spread=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 2.0, 8.0, 60.0, 1e38]),
    temperature=st.sampled_from([1e-3, 0.2, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 40, 500, 15_000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-30, 0.05, 1.0]),
)
def test_the_token_is_that_of_the_plain_definition(
    seed: int, vocab: int, shape: str, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = shaped_logits(shape, vocab, spread, seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert [Sampler(params).pick(logits, position)[0] for position in range(4)] == [
        plain_draw(logits, params, position) for position in range(4)
    ]


BATCH = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 5, "repetition_penalty": 1.3},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9, "logprobs": 20},
    {"seed": 3, "top_p": 0.9, "temperature": 0.6, "logprobs": 2},
    {"seed": 4, "top_k": 40, "min_p": 0.05, "frequency_penalty": 0.5, "presence_penalty": 0.1},
    {"seed": 5, "top_p": 0.5, "logit_bias": {3: 2.0}},
]


def test_a_batch_picks_what_each_session_picks_alone() -> None:
    rng = np.random.default_rng(8)
    samplers = [(Sampler(SamplingParams(**p), [1, 2]), Sampler(SamplingParams(**p), [1, 2])) for p in BATCH]
    for position in range(12):
        order = rng.permutation(len(BATCH))
        logits = (rng.standard_normal((len(BATCH), 6000)) * 3).astype(np.float32)
        outcomes = pick_rows(logits, [PickRequest(samplers[i][0], position) for i in order])
        alone = [samplers[i][1].pick(row, position) for i, row in zip(order, logits, strict=True)]
        assert outcomes == [[picked] for picked in alone]
        for i, (token, _) in zip(order, alone, strict=True):
            samplers[i][1].accept(token)


def test_a_row_that_fails_fails_its_own_session_only() -> None:
    logits = np.stack([LOGITS, LOGITS, LOGITS, LOGITS])
    logits[1, 2] = math.nan
    greedy, biased = SamplingParams(temperature=0), SamplingParams(temperature=0, logit_bias={6: 1.0})
    outcomes = pick_rows(logits, [PickRequest(Sampler(p), 7) for p in (greedy, greedy, biased, greedy)])
    assert outcomes[0] == outcomes[3] == [(1, None)]
    assert isinstance(outcomes[1], LocalFault)
    assert isinstance(outcomes[2], InvalidRequest)


@pytest.mark.parametrize("params", BATCH)
@pytest.mark.parametrize("right", range(5))
def test_a_verify_step_picks_what_single_steps_pick_up_to_the_first_wrong_draft_token(params: dict[str, Any], right: int) -> None:
    logits = (np.random.default_rng(right).standard_normal((6, 6000)) * 3).astype(np.float32)
    single, verifier = Sampler(SamplingParams(**params), [1]), Sampler(SamplingParams(**params), [1])
    picks = []
    for position, row in enumerate(logits):
        picks.append(single.pick(row, position))
        single.accept(picks[-1][0])
    draft = [token if i < right else token + 1 for i, (token, _) in enumerate(picks[:4])]
    others = [PickRequest(Sampler(SamplingParams(**params), [1]), 0) for _ in range(2)]
    requests = [others[0], PickRequest(verifier, 0, draft), others[1]]
    before, verified, after = pick_rows(logits[[0, 0, 1, 2, 3, 4, 0]], requests)
    assert before == after == picks[:1]
    assert verified == picks[: right + 1]
    assert verifier.pick(logits[right + 1], right + 1) == picks[right + 1]  # the sampler has accepted what was returned


def test_a_verify_step_ends_before_a_row_that_fails() -> None:
    logits = np.stack([LOGITS, LOGITS, LOGITS])
    logits[2, 0] = math.inf
    (outcome,) = pick_rows(logits, [PickRequest(Sampler(SamplingParams(temperature=0)), 0, [1, 1])])
    assert outcome == [(1, None), (1, None)]
    logits[0, 0] = math.inf
    (outcome,) = pick_rows(logits, [PickRequest(Sampler(SamplingParams(temperature=0)), 0, [1, 1])])
    assert isinstance(outcome, LocalFault)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_the_lowest_temperatures_pick_a_likeliest_token(temperature: float) -> None:
    assert set(drawn(50, temperature=temperature)) == {1, 3}


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_logprobs_are_those_of_a_softmax_in_double_precision(spread: float) -> None:
    logits = (np.random.default_rng(2).standard_normal(5000) * spread).astype(np.float32)
    expected = np.log(softmax(logits))
    _, found = Sampler(SamplingParams(temperature=0, logprobs=20)).pick(logits, 0)
    assert found is not None
    ranked = sorted(range(len(logits)), key=lambda id_: (-logits[id_], id_))[:20]
    assert [id_ for id_, _ in found.top] == ranked
    assert [value for _, value in found.top] == pytest.approx([expected[id_] for id_ in ranked], abs=1e-5)
    assert found.chosen == pytest.approx(expected[ranked[0]], abs=1e-5)
