"""Which sampling parameters a model can use. Checked where a request arrives, and again by the stage that samples."""

import math
from collections.abc import Iterator

from meshd.errors import InvalidSampling
from meshd.types import SamplingParams

_FACTOR = 1e3
"""A repetition penalty divides and multiplies logits by at most this much: far more would leave the range of float32."""
_SUMMAND = 1e4
"""Bounds penalties and biases, which are added to logits."""


def check_sampling(params: SamplingParams, vocab: int) -> None:
    """Check the parameters for a model with `vocab` tokens. Raises: InvalidSampling, which names the parameter."""
    for name, text in _faults(params, vocab):
        raise InvalidSampling(f"{name} can't be used: {text}", param=name)


def _faults(params: SamplingParams, vocab: int) -> Iterator[tuple[str, str]]:
    """Yield (parameter, what is wrong with it)."""
    for name, low, high in (
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -_SUMMAND, _SUMMAND),
        ("frequency_penalty", -_SUMMAND, _SUMMAND),
        ("repetition_penalty", 1 / _FACTOR, _FACTOR),
    ):
        value = getattr(params, name)
        if not low <= value <= high:  # NaN is in no range
            yield name, f"{value:g} is not from {low:g} to {high:g}"
    if params.top_k < 0:
        yield "top_k", f"{params.top_k} is below 0"
    if params.logprobs is not None and params.logprobs < 0:
        yield "logprobs", f"{params.logprobs} is below 0"
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab:
            yield "logit_bias", f"token {token} is outside the vocabulary, whose ids go from 0 to {vocab - 1}"
        if not math.isfinite(bias) or abs(bias) > _SUMMAND:
            yield "logit_bias", f"the bias {bias:g} of token {token} is not from {-_SUMMAND:g} to {_SUMMAND:g}"
