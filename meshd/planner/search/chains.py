"""The exact search for a chain of stages: every order of every subset of the peers, with every cut.

A chain is an ordered subset of peers that share the layers `[0, L)` among them, each one contiguous run. The search is Held and
Karp's dynamic program with the cut as one more dimension. Built from the last stage backwards,

    tails[S, i, e, c] = the best chain of exactly the peers S over layers [c, L) that starts at i and ends at e
    tails[S+i, i, e, c] = best over c' > c of  stage[i, c, c'] + (best over j in S of  link[i, j] + tails[S, j, e, c'])

with `max` for `+` when the largest term counts. The end e is carried along for the token's way back to the first stage; without
that, one row is enough. Work: 2^n · n² · L · (n + longest run), done by numpy for all sets of a size at once.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshd.planner.chain import Array, Chain, LayerRun
from meshd.planner.search.limits import TIE, SearchLimits

Numbers = NDArray[np.int64]

SMALL = 60_000
"""Up to so many entries, one broadcast over the whole table is faster than a loop over run lengths."""


@dataclass(frozen=True, slots=True)
class ChainCosts:
    """Costs of a chain's stages and links. inf: not possible."""

    stage: Array
    """`[peers, cuts, cuts]`: layers `[a, b)` on a peer; inf wherever b <= a."""
    link: Array
    """`[peers, peers]`: from a stage to the next one's peer."""
    back: Array | None = None
    """`[peers, peers]`: from the last stage to the first; None: does not count."""
    worst: bool = False
    """True: a chain costs its largest term; False: the sum."""

    @property
    def peers(self) -> int:
        return len(self.stage)

    @property
    def layers(self) -> int:
        return len(self.stage[0]) - 1

    def join(self, one: Array | float, other: Array) -> Array:
        """Two terms of one chain."""
        joined: Array = np.maximum(one, other) if self.worst else one + other
        return joined


class Search(Protocol):
    """Finds a cheap chain; the exact search and the heuristic one share this signature."""

    def __call__(self, costs: ChainCosts, limits: SearchLimits) -> Chain | None: ...


def exact_search(costs: ChainCosts, limits: SearchLimits) -> Chain | None:
    """Find the cheapest chain; among equals the one of fewest peers, then of the lowest peer indices.

    Returns: None if no chain is possible within the limits.
    """
    tails = _Tails(costs)
    floor = relaxed_bound(costs)
    most = min(costs.peers, costs.layers)
    if limits.exactly is not None:
        most = min(most, limits.exactly)
    best = np.inf
    for size in range(1, most + 1):
        if _at_least(costs, floor, size) >= best * (1 - TIE):
            break
        best = min(best, tails.grow(limits))
    return tails.pick(best) if np.isfinite(best) else None


def relaxed_bound(costs: ChainCosts) -> float:
    """A lower bound on every chain's cost: the optimum if peers may repeat and links are free."""
    cheapest = costs.stage.min(axis=0)
    bound = np.zeros(costs.layers + 1)
    for start in range(costs.layers - 1, -1, -1):
        bound[start] = costs.join(cheapest[start, start + 1 :], bound[start + 1 :]).min()
    return float(bound[0])


def _at_least(costs: ChainCosts, floor: float, size: int) -> float:
    """A lower bound on the cost of chains of `size` peers or more."""
    if size == 1:
        return floor
    apart = ~np.eye(costs.peers, dtype=bool)
    hop = float(costs.link[apart].min())
    back = 0.0 if costs.back is None else float(costs.back[apart].min())
    return max(floor, hop, back) if costs.worst else floor + (size - 1) * hop + back


def runs_by_length(costs: ChainCosts) -> list[list[tuple[int, Array]]]:
    """Per peer: (length, cost of `[c, c + length)` for every c), for each length that is possible anywhere."""
    table = []
    for stage in costs.stage:
        diagonals = ((length, np.ascontiguousarray(stage.diagonal(length))) for length in range(1, costs.layers + 1))
        table.append([(length, run) for length, run in diagonals if np.isfinite(run).any()])
    return table


def prepend(costs: ChainCosts, peer: int, runs: list[tuple[int, Array]], onward: Array) -> Array:
    """The best run of the peer before each tail: `[..., cuts]` of tails to `[..., cuts]` of longer ones."""
    cuts = costs.layers + 1
    if onward.size * cuts <= SMALL:
        best: Array = costs.join(costs.stage[peer], onward[..., None, :]).min(axis=-1)
        return best
    longer = np.full_like(onward, np.inf)
    for length, run in runs:
        grown = longer[..., :-length]
        np.minimum(grown, costs.join(run, onward[..., length:]), out=grown)
    return longer


class _Tails:
    """The table of the module's docstring, filled by size of set. Peer i is bit n-1-i, so a larger number is a lower set."""

    def __init__(self, costs: ChainCosts) -> None:
        self._costs = costs
        self._ends = 1 if costs.back is None else costs.peers
        self._bit = 1 << np.arange(costs.peers - 1, -1, -1)
        self._runs = runs_by_length(costs)
        self._row = np.zeros(1 << costs.peers, dtype=np.intp)
        self._sets: list[Numbers] = []
        self._tables: list[Array] = []
        self._wholes: list[Array] = []

    def grow(self, limits: SearchLimits) -> float:
        """Fill the sets of one peer more than the last; the least cost among them of a whole chain that the limits allow."""
        peers = range(self._costs.peers)
        members = list(combinations(peers, len(self._tables) + 1))
        sets = self._bit[np.array(members)].sum(axis=1)
        self._row[sets] = np.arange(len(sets))
        table = np.full((len(sets), len(peers), self._ends, self._costs.layers + 1), np.inf)
        for peer in peers:
            if self._tables:
                self._start_with(peer, sets, table)
            else:
                table[peer, peer, 0 if self._ends == 1 else peer] = self._costs.stage[peer, :, -1]
        whole = table[:, :, :, 0] if self._costs.back is None else self._costs.join(table[:, :, :, 0], self._costs.back.T)
        whole = np.where(np.array([limits.allow(chosen) for chosen in members])[:, None, None], whole, np.inf)
        self._sets.append(sets)
        self._tables.append(table)
        self._wholes.append(whole)
        return float(whole.min())

    def pick(self, best: float) -> Chain:
        """The first of the chains that cost `best`, by the order that `exact_search` promises."""
        size = next(size for size, whole in enumerate(self._wholes) if whole.min() <= best * (1 + TIE))
        close = self._wholes[size] <= best * (1 + TIE)
        rows, firsts, _ = np.nonzero(close)
        chosen = np.lexsort((rows, firsts))[0]
        row, first = int(rows[chosen]), int(firsts[chosen])
        runs = self._walk(int(self._sets[size][row]), first, np.flatnonzero(close[row, first]))
        return Chain(float(self._wholes[size][row, first].min()), tuple(runs))

    def _start_with(self, peer: int, sets: Numbers, table: Array) -> None:
        """Fill the chains that start at the peer."""
        costs, bit = self._costs, self._bit[peer]
        having = np.flatnonzero(sets & bit)
        shorter = self._row[sets[having] ^ bit]
        onward = np.full((len(having), *table.shape[2:]), np.inf)
        for other in range(costs.peers):
            if other != peer:
                np.minimum(onward, costs.join(costs.link[peer, other], self._tables[-1][shorter, other]), out=onward)
        table[having, peer] = prepend(costs, peer, self._runs[peer], onward)

    def _walk(self, members: int, peer: int, ends: Numbers) -> list[LayerRun]:
        """The runs of the best chain over these peers; of those that end at one of `ends`, the one of the lowest peers."""
        costs, start, runs = self._costs, 0, []
        while members != self._bit[peer]:
            members ^= int(self._bit[peer])
            tails = self._tables[members.bit_count() - 1][self._row[members]][:, ends]
            onward = costs.join(costs.link[peer][:, None, None], tails)
            values = costs.join(costs.stage[peer, start], onward)
            close = values <= values.min(axis=(0, 2), keepdims=True) * (1 + TIE)
            following = int(np.flatnonzero(close.any(axis=(1, 2)))[0])
            cut = int(np.flatnonzero(close[following].any(axis=0))[0])
            ends = ends[close[following, :, cut]]
            runs.append(LayerRun(peer, start, cut))
            peer, start = following, cut
        return [*runs, LayerRun(peer, start, costs.layers)]
