"""The toy model computed in the plainest way: no KV pool, stages or batches, one token after another, running checksums."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from struct import Struct

import numpy as np

from meshd.kernels.sampling.sampler import Sampler
from meshd.types import SamplingParams, TokenLogprobs
from sim.toy.mathematics import END, F32, PRIME, checksum, embed, logits_of, mix, project

_ROW = Struct("<2f")


@dataclass(slots=True)
class PlainModel:
    """The model without cluster: `feed` tokens one by one, then read `logits`."""

    layers: int
    numerics: int = 0
    position: int = 0
    h: tuple[int, int, int, int] = (0, 0, 0, 0)
    sums: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = [[0, 0] for _ in range(self.layers)]

    def feed(self, token: int) -> None:
        h = embed(token)
        for layer in range(self.layers):
            k0, k1, v0, v1 = project(layer, self.position, h)
            sums = self.sums[layer]
            sums[0] = checksum(_ROW.pack(k0, k1), sums[0])
            sums[1] = checksum(_ROW.pack(v0, v1), sums[1])
            h = mix(h, sums[0] % PRIME, sums[1] % PRIME, self.numerics)
        self.h = h
        self.position += 1

    def logits(self) -> F32:
        return logits_of(np.array([self.h], dtype=np.int64))[0]


@dataclass(frozen=True, slots=True)
class Expected:
    """The correct answer to a request."""

    tokens: tuple[int, ...]
    """The token ids, including the end-of-sequence token if the answer ends with it."""
    logprobs: tuple[TokenLogprobs | None, ...]
    finish: str


def reference(
    layers: int,
    prompt: Sequence[int],
    sampling: SamplingParams,
    max_tokens: int,
    *,
    ignore_eos: bool = False,
    numerics: int = 0,
) -> Expected:
    """Compute the correct answer to a request, with the numerics of this number."""
    model, sampler = PlainModel(layers, numerics), Sampler(sampling, prompt)
    for token in prompt:
        model.feed(token)
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    while True:
        token, token_logprobs = sampler.pick(model.logits(), model.position)
        sampler.accept(token)
        tokens.append(token)
        logprobs.append(token_logprobs)
        if token == END and not ignore_eos:
            return Expected(tuple(tokens), tuple(logprobs), "stop")
        if len(tokens) == max_tokens:
            return Expected(tuple(tokens), tuple(logprobs), "length")
        model.feed(token)
