"""The exact search for the cheapest chain of stages: over every order of every subset of the peers, and every cut.

A chain is an ordered subset of the peers. Each of them takes one contiguous run of layers, and together they take `[0, L)`. The
search is the dynamic program of Held and Karp (1962) for the travelling salesman, with the cut as one more dimension. It builds
chains from the last stage backwards:

    tails[S, i, e, c] = cost of the cheapest chain of exactly the peers S over layers [c, L) that starts at i and ends at e
    tails[S+i, i, e, c] = least over c' > c of  stage[i, c, c'] + (least over j in S of  link[i, j] + tails[S, j, e, c'])

If a chain costs its largest term instead of the sum, `max` replaces `+`. The end e is needed for the link back to the first stage;
without such a link, one row for all ends is enough. Work: 2^n · n² · L · (n + longest run), done by numpy for all sets of one size
together.
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
"""Most entries of a table for which one broadcast over the table is faster than a loop over run lengths."""


@dataclass(frozen=True, slots=True)
class ChainCosts:
    """Costs of the stages and links of chains. inf: not possible."""

    stage: Array
    """Cost of layers `[a, b)` on a peer: `[peers, cuts, cuts]`; inf where b <= a."""
    link: Array
    """Cost of the link between the peers of consecutive stages: `[peers, peers]`."""
    back: Array | None = None
    """Cost of the link from the last stage to the first: `[peers, peers]`. None: free."""
    worst: bool = False
    """True: a chain costs its largest term; False: the sum."""

    @property
    def peers(self) -> int:
        return len(self.stage)

    @property
    def layers(self) -> int:
        return len(self.stage[0]) - 1

    def join(self, one: Array | float, other: Array) -> Array:
        """Combine the costs of two parts of a chain."""
        joined: Array = np.maximum(one, other) if self.worst else one + other
        return joined


class Search(Protocol):
    """A function that finds a cheap chain: the exact search or the heuristic one."""

    def __call__(self, costs: ChainCosts, limits: SearchLimits) -> Chain | None: ...


def exact_search(costs: ChainCosts, limits: SearchLimits) -> Chain | None:
    """Find the cheapest chain. Of equal chains, take the one with the fewest peers, then the one with the lowest peer indices.

    Returns: the chain; None if no chain is possible within the limits.
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
    """Return a lower bound on the cost of every chain: the optimum if a peer could have several stages and links were free."""
    cheapest = costs.stage.min(axis=0)
    bound = np.zeros(costs.layers + 1)
    for start in range(costs.layers - 1, -1, -1):
        bound[start] = costs.join(cheapest[start, start + 1 :], bound[start + 1 :]).min()
    return float(bound[0])


def _at_least(costs: ChainCosts, floor: float, size: int) -> float:
    """Return a lower bound on the cost of chains of `size` or more peers. `floor`: the result of `relaxed_bound`."""
    if size == 1:
        return floor
    apart = ~np.eye(costs.peers, dtype=bool)
    hop = float(costs.link[apart].min())
    back = 0.0 if costs.back is None else float(costs.back[apart].min())
    return max(floor, hop, back) if costs.worst else floor + (size - 1) * hop + back


def runs_by_length(costs: ChainCosts) -> list[list[tuple[int, Array]]]:
    """List, for each peer, the run lengths possible at one cut or more: (length, cost of `[c, c + length)` at each cut c)."""
    table = []
    for stage in costs.stage:
        diagonals = ((length, np.ascontiguousarray(stage.diagonal(length))) for length in range(1, costs.layers + 1))
        table.append([(length, run) for length, run in diagonals if np.isfinite(run).any()])
    return table


def prepend(costs: ChainCosts, peer: int, runs: list[tuple[int, Array]], onward: Array) -> Array:
    """Put the cheapest run of `peer` before the rest of a chain.

    `runs` is the peer's item of `runs_by_length`. `onward` is the cost of the rest, by the cut where the run ends: `[..., cuts]`.

    Returns: the cost of the run and the rest, by the cut where the run starts: `[..., cuts]`.
    """
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
    """The table `tails` of the module's docstring. It is filled for all sets of one peer, then of two, and so on.

    A set of peers is a bit mask, in which peer i is bit n-1-i. The sets of one size are the rows of one table, in the order of
    `itertools.combinations`; `_row` has the row of each mask.
    """

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
        """Fill the table for the sets with one more peer than those of the previous call.

        Returns: the least cost of a chain over all layers whose peers are such a set and are allowed by `limits`; inf if there is
        no such chain.
        """
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
        """Return the first of the chains that cost `best`, in the order that `exact_search` documents."""
        size = next(size for size, whole in enumerate(self._wholes) if whole.min() <= best * (1 + TIE))
        close = self._wholes[size] <= best * (1 + TIE)
        rows, firsts, _ = np.nonzero(close)
        chosen = np.lexsort((rows, firsts))[0]
        row, first = int(rows[chosen]), int(firsts[chosen])
        runs = self._walk(int(self._sets[size][row]), first, np.flatnonzero(close[row, first]))
        return Chain(float(self._wholes[size][row, first].min()), tuple(runs))

    def _start_with(self, peer: int, sets: Numbers, table: Array) -> None:
        """Fill the entries of `table` for chains that start at `peer`. `sets`: the masks of its rows."""
        costs, bit = self._costs, self._bit[peer]
        having = np.flatnonzero(sets & bit)
        shorter = self._row[sets[having] ^ bit]
        onward = np.full((len(having), *table.shape[2:]), np.inf)
        for other in range(costs.peers):
            if other != peer:
                np.minimum(onward, costs.join(costs.link[peer, other], self._tables[-1][shorter, other]), out=onward)
        table[having, peer] = prepend(costs, peer, self._runs[peer], onward)

    def _walk(self, members: int, peer: int, ends: Numbers) -> list[LayerRun]:
        """Trace the cheapest chain of `members` from `peer` to one of `ends`. Of equal chains, take the lowest peer indices."""
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
