"""Logits of many shapes, as the tests and the benchmark of sampling use them."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def _peaked(rng: np.random.Generator, vocab: int) -> npt.NDArray[np.float64]:
    """Give most of the probability to one token in 3,000."""
    logits = rng.standard_normal(vocab)
    logits[rng.integers(0, vocab, 1 + vocab // 3000)] += 6.5
    return logits


SHAPES: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]]] = {
    "normal": lambda rng, vocab: rng.standard_normal(vocab),
    "peaked": _peaked,
    "one token": lambda rng, vocab: np.where(np.arange(vocab) == rng.integers(vocab), 30.0, rng.standard_normal(vocab)),
    "zipf": lambda rng, vocab: -np.log(1.0 + rng.permutation(vocab)),
    "tied": lambda rng, vocab: np.round(rng.standard_normal(vocab)),
    "two values": lambda rng, vocab: rng.integers(0, 2, vocab).astype(np.float64),
    "coarse": lambda rng, vocab: np.round(rng.standard_normal(vocab) * 50) / 50,
    "ascending": lambda rng, vocab: np.sort(rng.standard_normal(vocab)),
    "descending": lambda rng, vocab: -np.sort(rng.standard_normal(vocab)),
    "periodic": lambda rng, vocab: np.where(np.arange(vocab) % 61, rng.standard_normal(vocab), -3.0),
}
"""By name: logits of spread 1. "periodic" hides from a sample of every 61st token what the others are like."""


def shaped_logits(shape: str, vocab: int, spread: float, seed: int = 1) -> F32:
    """Make logits. Returns: `[vocab]`, those of `SHAPES[shape]` times `spread`, within the range of float32."""
    scaled = SHAPES[shape](np.random.default_rng(seed), vocab) * spread
    return np.clip(scaled, -3e38, 3e38).astype(np.float32)
