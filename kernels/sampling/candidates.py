"""Finds the tokens that may be drawn, and draws one, without sorting the vocabulary.

A token's weight is its probability relative to that of the likeliest token, rounded to a multiple of 2^-34. float64 adds up 2^19
such weights (more than any vocabulary has) without rounding, so a sum is the same in any order and over any parts: the smallest
weight of the nucleus and the token drawn are exactly those that a sorted vocabulary gives, whichever part of it is looked at.
"""

import math
import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_ROUND = np.float32(2.0**-11)
"""float32 numbers from 2^-11 to 2^-10 are 2^-34 apart: adding this and taking it off again rounds to a multiple of 2^-34."""
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""float32 would round a lower temperature to 0. All tokens but the likeliest have weight 0 at this one already."""
_ABOVE, _BELOW = np.float32(2), np.float32(-1)
"""More and less than any weight."""
_BLOCK = 256
"""Tokens in a block. The draw finds the block by the blocks' sums (594 in a vocabulary of 152,064), then the token in it."""
_SORTED_WHOLE = 4096
"""Up to this size all weights are sorted: that takes no longer than looking for the part that matters."""
_FEW = 20
"""Up to one weight in 20 it is faster to add up only those that are asked for than to multiply all by 0 or 1."""
_STRIDE = 61
"""Every 61st weight is a sample. A prime number, so that the sample follows no pattern of the ids."""
_HEAD = 16
"""The head is what is above the 16th largest of the sample: some 1,000 tokens, which is all of most nuclei of a trained model."""
_DEVIATIONS, _MARGIN = 4.0, 8
"""A range holds as many more weights of the sample than expected: standard deviations of their number, and a few for small ones.
None of 5,000 nuclei (152,064 tokens, 28 distributions, top_p from 0.5 to 0.99) ended outside its range, which costs a sort of the
vocabulary."""
_GROUP = 64
"""Number of tokens in a group, when the likeliest are searched: the `count`-th largest of the groups' maxima is a lower bound."""


@dataclass(frozen=True)
class Weights:
    """The weights of all tokens. The next call of `weigh` in this thread overwrites them."""

    values: F32
    """`[vocab]`, multiples of 2^-34."""

    @cached_property
    def sums(self) -> F64:
        """`[blocks]`: the sum of each block of `_BLOCK` consecutive tokens."""
        return _block_sums(self.values)

    @cached_property
    def total(self) -> float:
        """The sum of all weights."""
        return float(self.sums.sum())


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that may be drawn: all whose weight is above `least`, and of those with this weight the ids up to `last`."""

    sums: F64
    """`[blocks]`: the sum of the candidates' weights in each block."""
    least: float
    last: int


class _Scratch(threading.local):
    """One thread's memory for arrays of the size of a vocabulary, which no caller keeps.

    A new array of this size is fresh memory from the system: first touching it takes longer than computing what is in it (picks
    took three times as long). In all 10 bytes a token are held, 1.5 MB for 152,064.
    """

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def floats(self, name: str, size: int) -> F32:
        return self._bytes(name, 4 * size).view(np.float32)

    def flags(self, name: str, size: int) -> Flags:
        return self._bytes(name, size).view(np.bool_)

    def _bytes(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = np.empty(size, np.uint8)
        return held[:size]


_SCRATCH = _Scratch()


def weigh(scores: F32, largest: float, temperature: float) -> Weights:
    """Compute the weights of the tokens. `largest` is the largest score; its weight is exactly 1.

    At temperature 1 a token that is 24.3 below the likeliest has weight 0.
    """
    values = _SCRATCH.floats("weights", len(scores))
    with np.errstate(over="ignore", under="ignore"):  # a token far below the likeliest one gets weight 0
        np.subtract(scores, np.float32(largest), out=values)
        if temperature != 1:
            values /= np.float32(max(temperature, _LEAST_TEMPERATURE))
        np.exp(values, out=values)
    values += _ROUND
    values -= _ROUND
    return Weights(values)


def likeliest(scores: F32, count: int) -> Ids:
    """Find the ids of the `count` largest scores, ascending. Of equal scores at the threshold, the lowest ids are taken."""
    if count >= len(scores):
        return np.arange(len(scores))
    if count == 0:
        return np.arange(0)
    threshold = _bound(scores, count)
    ids = np.flatnonzero(np.greater_equal(scores, threshold, out=_SCRATCH.flags("inside", len(scores))))
    found = scores[ids]
    if np.count_nonzero(found > threshold) >= count:
        threshold = np.partition(found, len(found) - count)[len(found) - count]
    kept = found > threshold
    kept[np.flatnonzero(found == threshold)[: count - np.count_nonzero(kept)]] = True
    chosen: Ids = ids[kept]
    return chosen


def _bound(scores: F32, count: int) -> np.float32:
    """Return a score that at least `count` tokens reach; where `count` is small, hardly more do."""
    width = len(scores) // _GROUP  # token i belongs to group i modulo width: so numpy compares whole rows at once
    maxima = scores if width < 2 * count else scores[: _GROUP * width].reshape(_GROUP, width).max(axis=0)
    bound: np.float32 = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    return bound


def candidates(weights: Weights, top_p: float, min_p: float) -> Candidates:
    """Find the tokens that remain after top_p, then min_p, which is a share of the largest weight. At least one remains."""
    least, found = np.float32(min_p), None
    if top_p < 1:
        found = _nucleus(weights, top_p * weights.total)
    if least > (found.least if found else 0):
        found = Candidates(_above(weights.values, np.nextafter(least, _BELOW))[1], float(least), len(weights.values))
    return found or Candidates(weights.sums, 0.0, len(weights.values))


def draw(weights: Weights, found: Candidates, share: float) -> int:
    """Return the first candidate, by id, at which the cumulated weight exceeds `share` of the candidates' weight."""
    sums = np.cumsum(found.sums)
    target = min(share * sums[-1], np.nextafter(sums[-1], 0))  # the product may be rounded up to the whole
    block = int(np.searchsorted(sums, target, side="right"))
    values = weights.values[block * _BLOCK : (block + 1) * _BLOCK]
    kept = values * _kept(values, np.arange(len(values)), found.least, found.last - block * _BLOCK)
    inside = (sums[block - 1] if block else 0.0) + np.cumsum(kept, dtype=np.float64)
    return block * _BLOCK + int(np.searchsorted(inside, target, side="right"))


def _kept(values: F32, ids: Ids, least: float, last: int) -> Flags:
    threshold = np.float32(least)
    kept: Flags = (values > threshold) | ((values == threshold) & (ids <= last))
    return kept


def _block_sums(values: F32) -> F64:
    sums: F64 = np.add.reduceat(values, np.arange(0, len(values), _BLOCK), dtype=np.float64)
    return sums


def _above(values: F32, least: np.float32) -> tuple[Flags, F64]:
    """Find the weights above `least`. Returns: which they are, and the blocks' sums of them."""
    above = np.greater(values, least, out=_SCRATCH.flags("above", len(values)))
    if np.count_nonzero(above) < len(values) // _FEW:
        ids = np.flatnonzero(above)
        sums: F64 = np.bincount(ids // _BLOCK, values[ids], -(-len(values) // _BLOCK)).astype(np.float64, copy=False)
        return above, sums
    return above, _block_sums(np.multiply(values, above, out=_SCRATCH.floats("above floats", len(values))))


def _nucleus(weights: Weights, needed: float) -> Candidates:
    """Find the smallest set of likeliest tokens whose weights add up to at least `needed`. It has at least one token."""
    found = _expected_nucleus(weights, needed) if len(weights.values) > _SORTED_WHOLE else None
    if found is None:
        found = _cut(weights.values, needed, np.zeros(len(weights.sums)), _ABOVE, weights.values > 0)
    return found or Candidates(weights.sums, 0.0, len(weights.values))


def _expected_nucleus(weights: Weights, needed: float) -> Candidates | None:
    """Find the nucleus where a sample of the weights expects its end. Returns: None if it ends elsewhere.

    The head is added up, because a few large weights that no sample holds may make up most of the whole. Of the rest, the sample
    says at which weight the nucleus is likely to end. What is above this weight is added up: what is missing or too much says how
    far away the end is.
    """
    values = weights.values
    sample = np.sort(values[::_STRIDE])[::-1]
    pivot = sample[_HEAD - 1]
    inside = np.greater(values, pivot, out=_SCRATCH.flags("inside", len(values)))
    head = float(values[np.flatnonzero(inside)].sum(dtype=np.float64))
    if head >= needed:
        return _cut(values, needed, np.zeros(len(weights.sums)), _ABOVE, inside)
    rest = sample[sample <= pivot]
    reached = np.cumsum(rest, dtype=np.float64)
    scale = (weights.total - head) / reached[-1]  # a pivot of 0 has a head of everything, so something is left
    centre = rest[min(int(np.searchsorted(reached, (needed - head) / scale)), len(rest) - 1)]
    guess = int(np.searchsorted(-rest, -centre))  # of equal weights the first: all of them count as not above the centre
    above, sums = _above(values, centre)
    missing = needed - float(sums.sum())
    end = int(np.searchsorted(reached, reached[guess] - centre + missing / scale))
    margin = _MARGIN + int(_DEVIATIONS * math.sqrt(abs(end - guess)))
    if missing <= 0:
        np.less_equal(values, rest[end - margin] if end >= margin else pivot, out=inside)
        inside &= above
    elif centre in rest[guess + 1 : guess + 2] and missing <= float(centre) * np.count_nonzero(values == centre):
        return _cut_equal(values, needed, sums, centre)
    else:
        np.greater_equal(values, rest[end + margin] if end + margin < len(rest) else 0, out=inside)
        np.greater(inside, above, out=inside)  # inside and not above
    return _cut(values, needed, sums, centre, inside)


def _cut(values: F32, needed: float, sums: F64, centre: np.float32, inside: Flags) -> Candidates | None:
    """Find the likeliest tokens whose weights add up to `needed`, if the least likely one of them is `inside`.

    `sums` are the blocks' sums of the weights above `centre`. All weights that are `inside`, or none, are above it.
    """
    ids = np.flatnonzero(inside)
    part, blocks = values[ids], ids // _BLOCK
    if len(part) and part[0] > centre:
        sums = sums - np.bincount(blocks, part, len(sums))
    before = float(sums.sum())
    ordered = np.sort(part)[::-1]
    end = _reach(ordered, before, needed)
    if before >= needed or end == len(ordered):
        return None
    least = ordered[end]
    last = int(ids[part == least][end - np.count_nonzero(part > least)])
    kept = part * _kept(part, ids, float(least), last)
    return Candidates(sums + np.bincount(blocks, kept, len(sums)), float(least), last)


def _cut_equal(values: F32, needed: float, sums: F64, least: np.float32) -> Candidates:
    """Find the likeliest tokens whose weights add up to `needed`: the least likely ones of them, possibly very many, weigh `least`.

    `sums` are the blocks' sums of the weights above `least`.
    """
    equal = np.equal(values, least, out=_SCRATCH.flags("inside", len(values)))
    counts = np.add.reduceat(equal, np.arange(0, len(values), _BLOCK), dtype=np.int64)
    reached = float(sums.sum()) + float(least) * np.cumsum(counts)
    block = int(np.searchsorted(reached, needed))
    ids = block * _BLOCK + np.flatnonzero(equal[block * _BLOCK : (block + 1) * _BLOCK])
    before = reached[block] - float(least) * len(ids)
    end = int(np.searchsorted(before + float(least) * np.arange(1, len(ids) + 1), needed))
    counts[block] = end + 1
    counts[block + 1 :] = 0
    return Candidates(sums + float(least) * counts, float(least), int(ids[end]))


def _reach(values: F32, before: float, needed: float) -> int:
    """Return the first index at which `before` and the weights up to there add up to `needed`; the length if none does."""
    sums = before + np.cumsum(_block_sums(values))
    block = int(np.searchsorted(sums, needed))
    part = values[block * _BLOCK : (block + 1) * _BLOCK]
    inside = (sums[block - 1] if block else before) + np.cumsum(part, dtype=np.float64)
    return min(block * _BLOCK, len(values)) + int(np.searchsorted(inside, needed))
