"""Finding candidates without sorting gives what sorting gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logits import SHAPES, shaped_logits
from meshd.kernels.sampling import candidates
from meshd.kernels.sampling.candidates import Candidates, likeliest, weigh

VOCAB = 30_000
SPREADS = [0.0, 1e-6, 0.01, 1.0, 3.0, 20.0]


def kept_ids(values: np.ndarray, found: Candidates) -> list[int]:
    least, ids = np.float32(found.least), np.arange(len(values))
    return np.flatnonzero((values > least) | ((values == least) & (ids <= found.last))).tolist()


def sorted_nucleus(values: np.ndarray, top_p: float) -> np.ndarray:
    order = np.lexsort((np.arange(len(values)), -values))
    sums = np.cumsum(values[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(sums, top_p * sums[-1])) + 1])


def check_nucleus(logits: np.ndarray, top_p: float) -> None:
    weights = weigh(logits, float(logits.max()), 1.0)
    found = candidates.candidates(weights, top_p, 0.0)
    expected = sorted_nucleus(weights.values, top_p)
    assert kept_ids(weights.values, found) == expected.tolist()
    kept = np.where(np.isin(np.arange(len(logits)), expected), weights.values, 0)
    assert [kept[i : i + 256].sum(dtype=np.float64) for i in range(0, len(kept), 256)] == found.sums.tolist()


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    spread=st.sampled_from(SPREADS),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12]),
    vocab=st.integers(1, 60_000),
    seed=st.integers(0, 1000),
)
def test_the_nucleus_is_that_of_the_sorted_vocabulary(shape: str, spread: float, top_p: float, vocab: int, seed: int) -> None:
    check_nucleus(shaped_logits(shape, vocab, spread, seed), top_p)


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[Candidates | None]:
    """Record what each search of a part of the vocabulary finds."""
    found: list[Candidates | None] = []
    cut = candidates._cut
    monkeypatch.setattr(candidates, "_cut", lambda *args: found.append(cut(*args)) or found[-1])
    return found


def test_a_nucleus_that_ends_elsewhere_than_expected_is_found(
    monkeypatch: pytest.MonkeyPatch, cuts: list[Candidates | None]
) -> None:
    monkeypatch.setattr(candidates, "_MARGIN", -3)
    monkeypatch.setattr(candidates, "_DEVIATIONS", 0)
    for seed in range(20):
        for spread in SPREADS:
            check_nucleus(shaped_logits("normal", VOCAB, spread, seed), 0.9)
    assert cuts.count(None) > 20


def test_nuclei_end_where_they_are_expected(cuts: list[Candidates | None]) -> None:
    """Otherwise the whole vocabulary would be sorted: five times slower, the same tokens."""
    for seed in range(30):
        for shape in SHAPES:
            for spread in (0.01, 1.0, 3.0):
                logits = shaped_logits(shape, VOCAB, spread, seed)
                candidates.candidates(weigh(logits, float(logits.max()), 1.0), 0.9, 0.0)
    assert cuts.count(None) <= 3


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    spread=st.sampled_from(SPREADS),
    vocab=st.integers(1, 20_000),
    count=st.sampled_from([0, 1, 20, 40, 400, 19_000]),
    seed=st.integers(0, 1000),
)
def test_the_likeliest_are_those_of_the_sorted_vocabulary(shape: str, spread: float, vocab: int, count: int, seed: int) -> None:
    logits = shaped_logits(shape, vocab, spread, seed)
    expected = np.lexsort((np.arange(vocab), -logits))[:count]
    assert likeliest(logits, count).tolist() == np.sort(expected).tolist()


def test_weights_add_up_exactly_in_every_order() -> None:
    """Without rounding in any sum, or which part of the vocabulary is looked at would change tokens."""
    values = weigh(shaped_logits("normal", 300_000, 4.0), 20.0, 1.0).values
    shuffled = np.random.default_rng(1).permutation(values)
    exact = sum(int(value) for value in values.astype(np.float64) * 2**34)
    for order in (values, values[::-1], np.sort(values), shuffled):
        assert float(np.cumsum(order, dtype=np.float64)[-1]) * 2**34 == exact
    assert weigh(np.array([3.5, 3.5 - 24.4], np.float32), 3.5, 1.0).values.tolist() == [1.0, 0.0]
