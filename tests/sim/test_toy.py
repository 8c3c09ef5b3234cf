"""The toy model: any split gives the tokens of `reference`, and damage to KV changes the logits."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from meshd.kernels.backend import Segment
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.sampling.sampler import Sampler
from meshd.types import LayerRange, SamplingParams
from sim.toy.backend import Meter, Speed, ToyBackend
from sim.toy.mathematics import CONTEXT, HIDDEN, PRIME, toy_card
from sim.toy.reference import Expected, PlainModel, reference
from sim.toy.text import random_prompt
from tiny.kv import make_lease

CARD = toy_card()


class Split:
    """The toy model, split into stages at `cuts`."""

    def __init__(self, cuts: Sequence[int]) -> None:
        self.meter = Meter()
        loaded = ToyBackend(self.meter, Speed()).load(CARD.spec, LayerRange(0, 6), None, embedding=True, head=True)  # type: ignore[arg-type]
        borders = [0, *cuts, 6]
        self.stages = [loaded.stage(LayerRange(*border)) for border in pairwise(borders)]
        self.leases = [make_lease(CARD.spec, stage.layers, CONTEXT) for stage in self.stages]
        self.position = 0

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        hidden = self.stages[0].embed(np.array(ids, np.int32))
        for stage, lease in zip(self.stages, self.leases, strict=True):
            hidden = stage.forward(hidden, [Segment(lease, self.position, len(ids))])
        self.position += len(ids)
        return self.stages[-1].logits(hidden[-1:])[0]


@pytest.mark.parametrize("seed", range(20))
def test_any_split_and_any_chunks_give_the_same_tokens(seed: int) -> None:
    rng = random.Random(seed)
    prompt = random_prompt(rng, 200)
    sampling = SamplingParams(temperature=rng.choice([0, 1.0]), repetition_penalty=1.2, seed=seed, logprobs=1)
    expected = reference(6, prompt, sampling, 30, ignore_eos=True)
    split = Split(sorted(rng.sample(range(1, 6), rng.randint(0, 4))))
    sampler = Sampler(sampling, prompt)
    remaining, tokens = list(prompt), []
    while remaining:
        size = rng.randint(1, 64)
        logits = split.feed(remaining[:size])
        remaining = remaining[size:]
    while len(tokens) < 30:
        token, _ = sampler.pick(logits, split.position)
        sampler.accept(token)
        tokens.append(token)
        logits = split.feed([token])
    assert tuple(tokens) == expected.tokens
    assert split.meter.spent_s > 0


def test_a_chunk_gives_the_same_logits_as_single_tokens() -> None:
    one, many, plain = Split([2]), Split([3]), PlainModel(6)
    ids = random_prompt(random.Random(3), 60)
    for token in ids:
        one_logits = one.feed([token])
        plain.feed(token)
    assert (one_logits == many.feed(ids)).all()
    assert (one_logits == plain.logits()).all()


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("position", [0, 17, 39])
@pytest.mark.parametrize("part", range(4))
def test_every_value_of_kv_changes_the_logits(layer: int, position: int, part: int) -> None:
    ids = random_prompt(random.Random(1), 200)[:40] + (1,) * 40
    intact, damaged = Split([]), Split([])
    intact.feed(ids[:40])
    damaged.feed(ids[:40])
    damaged.leases[0].rows(layer)[part // 2][position, 0, part % 2] += 1
    assert (intact.feed(ids[40:41]) != damaged.feed(ids[40:41])).any()


def _swap(lease: HostLease) -> None:
    """Swap two positions of one layer."""
    for rows in lease.rows(2):
        rows[[5, 6]] = rows[[6, 5]]


def _stale(lease: HostLease) -> None:
    """Overwrite a page of one layer with another page."""
    for rows in lease.rows(1):
        rows[32:64] = rows[0:32]


def _lost(lease: HostLease) -> None:
    """Clear a page of one layer."""
    for rows in lease.rows(4):
        rows[32:64] = 0


@pytest.mark.parametrize("damage", [_swap, _stale, _lost])
def test_damaged_kv_changes_the_logits(damage: Callable[[HostLease], None]) -> None:
    ids = tuple(random.Random(2).randrange(64) for _ in range(70))
    intact, damaged = Split([]), Split([])
    intact.feed(ids)
    damaged.feed(ids)
    damage(damaged.leases[0])
    assert (intact.feed([3]) != damaged.feed([3])).any()


def test_steps_out_of_order_change_the_logits() -> None:
    right, wrong = Split([]), Split([])
    right.feed([1, 2, 3])
    for position, token in ((0, 1), (2, 3), (1, 2)):
        wrong.position = position
        wrong.feed([token])
    wrong.position = 3
    assert (right.feed([4]) != wrong.feed([4])).any()


def test_the_reference_ends_by_token_or_by_length() -> None:
    ends = {_reference(seed).finish for seed in range(40)}
    assert ends == {"stop", "length"}


def _reference(seed: int) -> Expected:
    return reference(6, (seed % 64, 1), SamplingParams(seed=seed), 40)


def test_products_are_exact_in_float32() -> None:
    assert CARD.spec.hidden == HIDDEN
    assert PRIME * PRIME < 2**24
