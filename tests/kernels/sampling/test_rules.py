"""Sampling parameters that a model can't use."""

import math
from typing import Any

import numpy as np
import pytest

from meshd.errors import InvalidSampling
from meshd.kernels.sampling.rules import check_sampling
from meshd.kernels.sampling.sampler import Sampler
from meshd.types import SamplingParams

VOCAB = 2000


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: -1e30}},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": 1e300},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"min_p": -0.5},
        {"presence_penalty": math.inf},
        {"frequency_penalty": 1e38},
        {"top_k": -1},
        {"logprobs": -1},
    ],
)
def test_parameters_that_no_peer_could_use_are_named(params: dict[str, Any]) -> None:
    (name,) = params
    with pytest.raises(InvalidSampling) as caught:
        check_sampling(SamplingParams(**params), VOCAB)
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_p": 0.0001, "top_k": 1, "min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 10.0},
        {"repetition_penalty": 0.01, "top_p": 0.5},
        {"logit_bias": {0: -100.0, VOCAB - 1: 100.0}, "logprobs": 20},
    ],
)
def test_whatever_the_api_accepts_and_a_sampler_can_use_is_accepted(params: dict[str, Any]) -> None:
    check_sampling(SamplingParams(**params), VOCAB)
    Sampler(SamplingParams(**params), range(10)).pick(np.linspace(-30, 30, VOCAB, dtype=np.float32), 5)


def test_scores_that_leave_the_range_of_float32_are_the_requests_mistake() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=0.001), range(10))
    with pytest.raises(InvalidSampling, match="not finite"):
        sampler.pick(np.full(VOCAB, 1e37, np.float32), 5)
