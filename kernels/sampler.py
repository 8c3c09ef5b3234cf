"""Picks the next token. The random draw is keyed by (seed, position), so every peer picks the same token from the same logits.

The steps, in order: repetition penalty (on prompt and answer, as in CTRL, https://arxiv.org/abs/1909.05858), presence and frequency
penalty (on the answer only) and logit bias as OpenAI defines them, temperature, top_k, top_p (https://arxiv.org/abs/1904.09751),
min_p (https://arxiv.org/abs/2407.01082). Of tokens with equal scores, the lowest id comes first.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from meshd.errors import InvalidSampling, LocalFault
from meshd.types import SamplingParams, TokenLogprobs

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_LIMITS = (1e-2, 1e-4, 1e-7)
"""Weights relative to the likeliest token's. Tried one after the other, until the tokens above one suffice."""
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""float32 would round a lower temperature to 0. All tokens but the likeliest have weight 0 at this one already."""


def needs_past_tokens(params: SamplingParams, answered: int) -> bool:
    """Whether picking the next token needs the tokens before it. `answered` is the number of tokens in the answer so far.

    The repetition penalty needs prompt and answer; presence and frequency penalty need the answer only.
    """
    return params.repetition_penalty != 1 or bool(answered and (params.presence_penalty or params.frequency_penalty))


class Sampler:
    """Sampling state of one session: its parameters and the tokens so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = (), answer_ids: Iterable[int] = ()) -> None:
        self._params = params
        self._seen = set(prompt_ids)
        self._counts: dict[int, int] = {}
        for token in answer_ids:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Append a token to the answer."""
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def pick(self, logits: F32, position: int) -> tuple[int, TokenLogprobs | None]:
        """Pick the token at `position` from `logits` `[vocab]`.

        Returns: the token, and its logprobs if the parameters ask for them.
        Raises: LocalFault if a logit is not finite; InvalidSampling if only the adjusted scores are not, or if logit_bias names a
        token outside the vocabulary.
        """
        if not np.isfinite(logits).all():
            raise LocalFault(f"no token can be picked at {position}: the logits hold NaN or infinity", hint="check the model file")
        scores = self._adjust(logits)
        if scores is not logits and not np.isfinite(scores).all():
            raise InvalidSampling(
                "with these penalties and biases the scores of the tokens are not finite", hint="use smaller ones"
            )
        token = int(scores.argmax()) if self._params.temperature == 0 else _draw(scores, self._params, position)
        return token, None if self._params.logprobs is None else _logprobs(logits, token, self._params.logprobs)

    def _adjust(self, logits: F32) -> F32:
        """Apply penalties and bias. Returns: a copy, or `logits` itself if there are none."""
        params = self._params
        penalised = self._counts if params.presence_penalty or params.frequency_penalty else {}
        repeated = self._seen if params.repetition_penalty != 1 else set()
        if not (penalised or repeated or params.logit_bias):
            return logits
        scores = logits.copy()
        if repeated:
            ids = np.fromiter(repeated, np.int64)
            values = scores[ids]
            with np.errstate(over="ignore"):  # `pick` refuses scores that are not finite
                adjusted = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            scores[ids] = adjusted
        for token, count in penalised.items():
            scores[token] -= params.presence_penalty + params.frequency_penalty * count
        for token, bias in params.logit_bias.items():
            if not 0 <= token < len(scores):
                raise InvalidSampling(f"logit_bias names token {token}: the vocabulary has {len(scores)}", param="logit_bias")
            scores[token] += bias
        return scores


def _draw(scores: F32, params: SamplingParams, position: int) -> int:
    """Draw a token by inverse transform sampling over the candidates, in the order of their ids."""
    weights = _weights(scores, params.temperature)
    ids = _candidates(weights, params)
    sums = np.cumsum(weights if ids is None else weights[ids], dtype=np.float64)
    index = int(np.searchsorted(sums, uniform(params.seed, position) * sums[-1], side="right"))
    index = min(index, len(sums) - 1)
    return index if ids is None else int(ids[index])


def _weights(scores: F32, temperature: float) -> F32:
    """Compute each token's probability relative to that of the likeliest token, whose weight is exactly 1."""
    with np.errstate(over="ignore", under="ignore"):  # a token far below the likeliest one gets weight 0
        weights: F32 = np.exp((scores - scores.max()) / np.float32(max(temperature, _LEAST_TEMPERATURE)))
    return weights


def uniform(seed: int, position: int) -> float:
    """Draw a number in [0, 1) from Philox4x64 with key `seed` modulo 2^64 and counter `position`.

    Source: https://doi.org/10.1145/2063384.2063405.
    """
    raw = np.random.Philox(key=seed % (1 << 64), counter=position << 64).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def _candidates(weights: F32, params: SamplingParams) -> Ids | None:
    """Filter ids by top_k, top_p and min_p. Returns: the remaining ids, ascending; None: all ids remain."""
    ids: Ids | None = None
    if 0 < params.top_k < len(weights):
        ids = np.sort(_largest(weights, params.top_k, _LIMITS))
    if params.top_p < 1:
        ids = _nucleus(weights, params.top_p) if ids is None else ids[_nucleus(weights[ids], params.top_p)]
    if params.min_p > 0:  # min_p is a share of the largest weight, which is 1
        ids = np.flatnonzero(weights >= params.min_p) if ids is None else ids[weights[ids] >= params.min_p]
    return None if ids is None else np.sort(ids)


def _heads(values: F32, limits: Iterable[float]) -> Iterator[Ids]:
    """Yield ever larger sets of the ids with the largest values, each ascending; the last one has all ids.

    A set holds every id whose value reaches a limit. So sorted by value it is the beginning of the sorted vocabulary, whichever
    set that is: which set sufficed changes no token. Sorting a vocabulary of 152,000 takes 11 ms, and 1,000 ids mostly suffice.
    """
    for limit in limits:
        yield np.flatnonzero(values >= limit)
    yield np.arange(len(values))


def _nucleus(weights: F32, top_p: float) -> Ids:
    """Find the smallest set of likeliest ids whose share of the total weight is at least `top_p`. It has at least one id."""
    needed = top_p * float(weights.sum(dtype=np.float64))
    ordered = np.arange(0)
    for ids in _heads(weights, _LIMITS):
        ordered = ids[np.argsort(-weights[ids], kind="stable")]  # of equal weights, the lowest id comes first
        sums = np.cumsum(weights[ordered], dtype=np.float64)
        if len(sums) and sums[-1] >= needed:
            return ordered[: int(np.searchsorted(sums, needed)) + 1]
    return ordered  # all ids: the two sums were rounded differently


def _largest(values: F32, count: int, limits: Iterable[float]) -> Ids:
    """Find the ids of the `count` largest values, in any order. Of equal values at the threshold, the lowest ids are taken."""
    ids = next((ids for ids in _heads(values, limits) if len(ids) >= count), np.arange(len(values)))
    if count >= len(ids):
        return ids
    if count == 0:
        return ids[:0]
    found = values[ids]
    threshold = np.partition(found, len(found) - count)[len(found) - count]
    above = np.flatnonzero(found > threshold)
    chosen: Ids = ids[np.concatenate([above, np.flatnonzero(found == threshold)[: count - len(above)]])]
    return chosen


def _logprobs(logits: F32, token: int, count: int) -> TokenLogprobs:
    """Compute the log-softmax of the raw logits, for `token` and the `count` likeliest tokens."""
    top = float(logits.max())
    total = math.log(float(_weights(logits, 1.0).sum(dtype=np.float64)))
    ids = _largest(logits, count, (top + math.log(limit) for limit in _LIMITS))
    likeliest = ids[np.lexsort((ids, -logits[ids]))]

    def logprob(id_: int) -> float:
        return float(logits[id_]) - top - total

    return TokenLogprobs(logprob(token), tuple((int(id_), logprob(int(id_))) for id_ in likeliest))
