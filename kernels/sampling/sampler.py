"""Picks the next token. The random draw is keyed by (seed, position), so every peer picks the same token from the same logits.

The steps, in order: repetition penalty (on prompt and answer, as in CTRL, https://arxiv.org/abs/1909.05858), presence and frequency
penalty (on the answer only) and logit bias as OpenAI defines them, temperature, top_k, top_p (https://arxiv.org/abs/1904.09751),
min_p (https://arxiv.org/abs/2407.01082). Of tokens with equal scores, the lowest id comes first.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from meshd.errors import InvalidSampling, LocalFault, MeshdError
from meshd.kernels.sampling.candidates import F32, Ids, Weights, candidates, draw, likeliest, weigh
from meshd.types import SamplingParams, TokenLogprobs

_U64 = (1 << 64) - 1
_ROUNDS = 10
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
"""Constants of Philox4x64: what multiplies the counter, and what is added to the key each round."""

Picked = tuple[int, TokenLogprobs | None]
"""A token, and its logprobs if its request asks for them."""


def needs_past_tokens(params: SamplingParams, answered: int) -> bool:
    """Whether picking the next token needs the tokens before it. `answered` is the number of tokens in the answer so far.

    The repetition penalty needs prompt and answer; presence and frequency penalty need the answer only.
    """
    return params.repetition_penalty != 1 or bool(answered and (params.presence_penalty or params.frequency_penalty))


@dataclass(frozen=True, slots=True)
class _Extremes:
    """The likeliest token of a row (of several the lowest id), its score, and whether all scores are finite."""

    likeliest: int
    largest: float
    finite: bool


def _extremes(scores: F32) -> list[_Extremes]:
    """Find the extremes of each row of `scores` `[rows, vocab]`."""
    tops = scores.argmax(axis=1)  # that of a NaN if there is one
    largest = scores[np.arange(len(scores)), tops]
    finite = np.isfinite(largest) & np.isfinite(scores.min(axis=1))
    return [_Extremes(*row) for row in zip(tops.tolist(), largest.tolist(), finite.tolist(), strict=True)]


class Sampler:
    """Sampling state of one session: its parameters and the tokens so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = (), answer_ids: Iterable[int] = ()) -> None:
        self._params: Final = params
        self._seen = set(prompt_ids)
        self._counts: dict[int, int] = {}
        for token in answer_ids:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Append a token to the answer."""
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def pick(self, logits: F32, position: int) -> Picked:
        """Pick the token at `position` from `logits` `[vocab]`.

        Raises: LocalFault if a logit is not finite; InvalidSampling if only the adjusted scores are not, or if logit_bias names a
        token outside the vocabulary.
        """
        return self._pick(logits, _extremes(logits[None])[0], position)

    def _pick(self, logits: F32, extremes: _Extremes, position: int) -> Picked:
        if not extremes.finite:
            raise LocalFault(f"no token can be picked at {position}: the logits hold NaN or infinity", hint="check the model file")
        params = self._params
        scores = self._adjust(logits)
        adjusted = extremes if scores is logits else _extremes(scores[None])[0]
        if not adjusted.finite:
            raise InvalidSampling(
                "with these penalties and biases the scores of the tokens are not finite", hint="use smaller ones"
            )
        weights = None
        if params.logprobs is not None:
            weights = weigh(logits, extremes.largest, 1.0)
            log_total = math.log(weights.total)
        token = adjusted.likeliest
        if params.temperature != 0:
            same = scores is logits and params.temperature == 1
            token = _draw(scores, adjusted.largest, weights if same else None, params, position)
        if params.logprobs is None:
            return token, None
        return token, _logprobs(logits, extremes.largest, log_total, token, params.logprobs)

    def _adjust(self, logits: F32) -> F32:
        """Apply penalties and bias. Returns: a copy, or `logits` itself if there are none."""
        params = self._params
        penalised = self._counts if params.presence_penalty or params.frequency_penalty else {}
        repeated = self._seen if params.repetition_penalty != 1 else set()
        if not (penalised or repeated or params.logit_bias):
            return logits
        scores = logits.copy()
        with np.errstate(over="ignore"):  # `_pick` refuses scores that are not finite
            if repeated:
                ids = np.fromiter(repeated, np.int64)
                values = scores[ids]
                scores[ids] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            if penalised:
                counts = np.fromiter(penalised.values(), np.float64)
                penalties = params.presence_penalty + params.frequency_penalty * counts
                scores[np.fromiter(penalised, np.int64)] -= penalties.astype(np.float32)
            if params.logit_bias:
                scores[_biased(params.logit_bias, len(scores))] += np.fromiter(params.logit_bias.values(), np.float32)
        return scores


@dataclass(frozen=True, slots=True)
class PickRequest:
    """What to pick for one session: its sampler, and the position of the first token.

    A verify step has `draft` tokens: the logits of its row i are those after the first i of them.
    """

    sampler: Sampler
    position: int
    draft: Sequence[int] = ()

    @property
    def rows(self) -> int:
        """Number of rows of logits."""
        return 1 + len(self.draft)


def pick_rows(logits: F32, requests: Sequence[PickRequest]) -> list[list[Picked] | MeshdError]:
    """Pick the next tokens of all sessions of a batch from `logits` `[rows, vocab]`, the rows in the order of the requests.

    The tokens picked are appended to the samplers' answers. Of a verify step the rows are picked one after
    the other, up to the first token that differs from the draft or whose row fails: the next step will pick there again, so no
    token depends on the draft.

    Returns: for each request at least one token, or the error of its first row as `Sampler.pick` raises it. What is returned for a
    request does not depend on the other requests.
    """
    extremes = _extremes(logits)
    outcomes: list[list[Picked] | MeshdError] = []
    first = 0
    for request in requests:
        end = first + request.rows
        outcomes.append(_pick_request(request, logits[first:end], extremes[first:end]))
        first = end
    assert first == len(logits)
    return outcomes


def _pick_request(request: PickRequest, logits: F32, extremes: Sequence[_Extremes]) -> list[Picked] | MeshdError:
    picked: list[Picked] = []
    for index, row in enumerate(logits):
        try:
            token, logprobs = request.sampler._pick(row, extremes[index], request.position + index)
        except MeshdError as error:
            return picked or error
        request.sampler.accept(token)
        picked.append((token, logprobs))
        if index < len(request.draft) and token != request.draft[index]:
            break
    return picked


def _biased(bias: dict[int, float], vocab: int) -> Ids:
    """Return the tokens of a logit_bias. Raises: InvalidSampling if one is outside the vocabulary."""
    for token in bias:
        if not 0 <= token < vocab:
            raise InvalidSampling(f"logit_bias names token {token}: the vocabulary has {vocab}", param="logit_bias")
    return np.fromiter(bias, np.int64)


def _draw(scores: F32, largest: float, weights: Weights | None, params: SamplingParams, position: int) -> int:
    """Draw a token by inverse transform sampling over the candidates, in the order of their ids.

    `largest` is the largest score. `weights` are those of all tokens at this temperature, if they are known.
    """
    ids: Ids | None = None
    if 0 < params.top_k < len(scores):
        ids = likeliest(scores, params.top_k)
        scores, weights = scores[ids], None
    if weights is None:
        weights = weigh(scores, largest, params.temperature)
    found = candidates(weights, params.top_p, params.min_p)
    index = draw(weights, found, uniform(params.seed, position))
    return index if ids is None else int(ids[index])


def uniform(seed: int, position: int) -> float:
    """Draw a number in [0, 1) from Philox4x64-10 with key `seed` modulo 2^64 and counter `position << 64`.

    The number is the first of a new `numpy.random.Philox`, which counts up before it draws. To make one takes four times as long.
    Source: https://doi.org/10.1145/2063384.2063405.
    """
    key0, key1 = seed & _U64, 0
    a, b, c, d = 1, position & _U64, 0, 0
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (right >> 64) ^ b ^ key0, right & _U64, (left >> 64) ^ d ^ key1, left & _U64
        key0, key1 = (key0 + _WEYL[0]) & _U64, (key1 + _WEYL[1]) & _U64
    return (a >> 11) * 2.0**-53


def _logprobs(logits: F32, largest: float, log_total: float, token: int, count: int) -> TokenLogprobs:
    """Compute the log-softmax of the raw logits, for `token` and the `count` likeliest tokens."""
    ids = likeliest(logits, count)
    ranked = ids[np.lexsort((ids, -logits[ids]))]
    values = logits[np.append(ranked, token)].astype(np.float64) - largest - log_total
    *top, chosen = values.tolist()
    return TokenLogprobs(chosen, tuple(zip(ranked.tolist(), top, strict=True)))
