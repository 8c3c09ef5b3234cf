"""Random requests of clients, each with its correct answer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.numerics import NumericsId
from meshd.types import FinishReason, ModelCard, SamplingParams
from sim.toy.mathematics import sim_numerics
from sim.toy.reference import Expected, reference
from sim.toy.text import letter, random_prompt


@dataclass(frozen=True, slots=True)
class CorrectAnswer:
    """What the client must receive if all layers are computed with one numerics."""

    expected: Expected
    text: str
    """The whole text, without the stop string."""
    finish: FinishReason
    completion_tokens: int


@dataclass(slots=True)
class ClientRequest:
    """One request, its correct answer, and how its client behaves."""

    number: int
    generation: GenerationRequest
    answers: dict[NumericsId, CorrectAnswer]
    starts_at: float
    patience_s: float
    """Seconds without an event after which the client turns to another peer."""
    reads_s: float = 0.0
    """Seconds that the client takes to read each delta."""
    leaves_at: int | None = None
    """Number of deltas after which the client disconnects. None: it stays."""
    stays_away_s: float = 0.0
    cancels_at: int | None = None
    """Number of deltas after which the client cancels its request. None: it does not."""
    seen: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """The deltas received so far, in order: text, and token ids if logprobs were requested."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Number of requests, seconds within which they start, and the longest prompt and answer in tokens."""

    requests: int
    within_s: float
    prompt: int = 150
    answer: int = 60
    numerics: int = 1
    """Number of different numerics in the cluster."""


def make_requests(rng: random.Random, cards: Sequence[ModelCard], workload: Workload) -> list[ClientRequest]:
    """Return the random requests of a whole run, in the order of their start."""
    starts = sorted(rng.uniform(0, workload.within_s) for _ in range(workload.requests))
    return [make_request(rng, cards, workload, number, start) for number, start in enumerate(starts)]


def make_request(rng: random.Random, cards: Sequence[ModelCard], workload: Workload, number: int, start: float) -> ClientRequest:
    """Return a random request with its correct answer, which `reference` computes."""
    card = cards[0] if len(cards) == 1 else rng.choice(cards)
    prompt = random_prompt(rng, workload.prompt if rng.random() < 0.8 else 8)
    sampling = _sampling(rng)
    max_tokens = rng.randint(1, workload.answer)
    ignore_eos = rng.random() < 0.5
    expected = [
        reference(card.spec.layers, prompt, sampling, max_tokens, ignore_eos=ignore_eos, numerics=number)
        for number in range(workload.numerics)
    ]
    letters = _letters(expected[0])
    stop: tuple[str, ...] = ()
    if len(letters) > 4 and rng.random() < 0.2:
        at = rng.randrange(len(letters) - 1)
        stop = ("".join(letters[at : at + 2]),)
    leaves = rng.randrange(1, 20) if rng.random() < 0.15 else None
    return ClientRequest(
        number=number,
        generation=GenerationRequest(
            model=card.name,
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            background=rng.random() < 0.2,
            mesh=MeshOptions(mirror=rng.choice([None, None, True])),
        ),
        answers={sim_numerics(index): _correct(each, stop) for index, each in enumerate(expected)},
        starts_at=start,
        patience_s=rng.choice([5.0, 15.0, 75.0]),
        reads_s=rng.choice([0.0, 0.0, 0.003, 0.01, 0.02, 0.05]),
        leaves_at=leaves,
        stays_away_s=rng.choice([0.2, 2.0, 8.0]),
        cancels_at=rng.randrange(1, 20) if rng.random() < 0.05 else None,
    )


def _letters(expected: Expected) -> list[str]:
    letters = [letter(token) for token in expected.tokens]
    return letters[:-1] if expected.finish == "stop" else letters


def _correct(expected: Expected, stop: tuple[str, ...]) -> CorrectAnswer:
    text = "".join(_letters(expected))
    if stop and stop[0] in text:
        cut = text.index(stop[0])
        return CorrectAnswer(expected, text[:cut], FinishReason.STOP, cut + len(stop[0]))
    return CorrectAnswer(expected, text, FinishReason(expected.finish), len(expected.tokens))


def _sampling(rng: random.Random) -> SamplingParams:
    seed = rng.getrandbits(32)
    kind = rng.randrange(4)
    logprobs = rng.choice([None, None, 2])
    if kind == 0:
        return SamplingParams(temperature=0, seed=seed, logprobs=logprobs)
    if kind == 1:
        return SamplingParams(temperature=1.0, seed=seed, logprobs=logprobs)
    if kind == 2:
        return SamplingParams(
            temperature=0.8,
            top_p=0.9,
            top_k=20,
            presence_penalty=0.6,
            frequency_penalty=0.3,
            seed=seed,
            logprobs=logprobs,
        )
    return SamplingParams(temperature=1.1, repetition_penalty=1.3, seed=seed, logit_bias={5: 2.0}, logprobs=logprobs)
