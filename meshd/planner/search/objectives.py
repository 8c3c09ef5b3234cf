"""Find the best chain by each objective, with one or more searches.

The terms of a chain are the costs of its stages and links. LATENCY and ENERGY minimise their sum (`cost`, from GenZ). THROUGHPUT
and MEMORY minimise the largest term. Among chains with the same largest term and number of peers, they take the one with the least
TPOT. TTFT minimises the time of a pipeline of prefill chunks (`cost.pipelined_s`, from Pipette): Σ terms + (chunks - 1) · the
slowest term.
"""

import heapq
from dataclasses import replace
from itertools import pairwise

import numpy as np

from meshd.planner.chain import Array, Chain
from meshd.planner.model import cost
from meshd.planner.model.tables import CostTables
from meshd.planner.search.exact import ChainCosts, Search
from meshd.planner.search.limits import TIE, SearchLimits
from meshd.types import Objective


def cheapest(tables: CostTables, objective: Objective, limits: SearchLimits, search: Search) -> Chain | None:
    """Find the best chain by this objective.

    Returns: the chain, with its value in the objective's unit (s, J, or a share of memory); None if no chain fits.
    """
    if objective is Objective.TTFT:
        return _least_ttft(tables, limits, search)
    if objective is Objective.ENERGY:
        return search(ChainCosts(tables.energy, tables.power[:, None] * tables.hop, tables.power[:, None] * tables.back), limits)
    if objective is Objective.THROUGHPUT:
        return _quickest_of_equals(ChainCosts(tables.decode, tables.hop, tables.back, worst=True), tables, limits, search)
    if objective is Objective.MEMORY:
        free = np.zeros_like(tables.hop)
        return _quickest_of_equals(ChainCosts(tables.share, free, worst=True), tables, limits, search)
    return search(_latency(tables), limits)


def _latency(tables: CostTables) -> ChainCosts:
    return ChainCosts(tables.decode, tables.hop, tables.back)


def _quickest_of_equals(costs: ChainCosts, tables: CostTables, limits: SearchLimits, search: Search) -> Chain | None:
    """Minimise the largest term, then TPOT among the chains with the same largest term and number of peers."""
    best = search(costs, limits)
    if best is None:
        return None
    top = best.value * (1 + TIE)
    quick = ChainCosts(
        _no_more(tables.decode, costs.stage, top),
        _no_more(tables.hop, costs.link, top),
        tables.back if costs.back is None else _no_more(tables.back, costs.back, top),
    )
    found = search(quick, replace(limits, exactly=len(best.runs)))
    return best if found is None else Chain(best.value, found.runs)


def _no_more(values: Array, bounded: Array, top: float) -> Array:
    return np.where(bounded <= top, values, np.inf)


def _least_ttft(tables: CostTables, limits: SearchLimits, search: Search) -> Chain | None:
    _, chunks = cost.chunking(tables.problem.prompt_tokens, tables.problem.chunk_tokens)
    whole = ChainCosts(tables.first_chunk, tables.chunk_hop)
    if chunks == 1:
        return search(whole, limits)
    return _Pipelined(whole, tables.chunk, chunks - 1, limits, search).best()


class _Pipelined:
    """Minimise Σ terms + following · slowest term, with searches under a bound on the slowest term. following = chunks - 1.

    Let A(T) be the least sum of a chain that has no term above T. A falls as T rises, so every chain whose slowest term is
    between lo and hi costs at least A(hi) + following · lo. An interval is dropped if this lower bound is not below the cost of
    the best chain so far. Otherwise it is split at the middle one of the term values in it. The result is exact if the search is
    exact.
    """

    def __init__(self, whole: ChainCosts, chunk: Array, following: float, limits: SearchLimits, search: Search) -> None:
        self._whole, self._chunk, self._following = whole, chunk, following
        self._limits, self._search = limits, search
        self._best: Chain | None = None
        terms = np.concatenate([chunk[np.isfinite(chunk)], whole.link[~np.eye(whole.peers, dtype=bool)]])
        self._terms: Array = np.unique(terms)

    def best(self) -> Chain | None:
        tightest = self._search(ChainCosts(self._chunk, self._whole.link, worst=True), self._limits)
        if tightest is None:
            return None
        least, high = self._index(tightest.value), len(self._terms) - 1
        self._try(least)
        floor, slowest = self._try(high)
        waiting = [(self._bound(floor, least), least, slowest - 1, floor)]
        while waiting:
            bound, low, high, floor = heapq.heappop(waiting)
            if low > high or self._can_drop(bound):
                continue
            middle = (low + high) // 2
            found, slowest = self._try(middle)
            for part in ((low, slowest - 1, max(found, floor)), (middle + 1, high, floor)):
                if part[0] <= part[1]:
                    heapq.heappush(waiting, (self._bound(part[2], part[0]), *part))
        return self._best

    def _try(self, index: int) -> tuple[float, int]:
        """Search for the chain with the least sum that has no term above `_terms[index]`, and keep it if it is the best so far.

        Returns: (its sum, the index of its slowest term); (inf, `index`) if there is no such chain.
        """
        top = float(self._terms[index])
        costs = ChainCosts(_no_more(self._whole.stage, self._chunk, top), _no_more(self._whole.link, self._whole.link, top))
        found = self._search(costs, self._limits)
        if found is None:
            return np.inf, index
        slowest = max(
            [float(self._chunk[run]) for run in found.runs]
            + [float(self._whole.link[one.peer, other.peer]) for one, other in pairwise(found.runs)]
        )
        self._keep(Chain(found.value + self._following * slowest, found.runs))
        return found.value, self._index(slowest)

    def _keep(self, chain: Chain) -> None:
        best = self._best
        if best is not None and abs(chain.value - best.value) <= TIE * best.value:
            self._best = min(best, chain, key=_order)
        elif best is None or chain.value < best.value:
            self._best = chain

    def _can_drop(self, bound: float) -> bool:
        return not np.isfinite(bound) or (self._best is not None and bound >= self._best.value * (1 - TIE))

    def _bound(self, floor: float, index: int) -> float:
        return floor + self._following * float(self._terms[index])

    def _index(self, value: float) -> int:
        return int(np.searchsorted(self._terms, value))


def _order(chain: Chain) -> tuple[int, tuple[int, ...]]:
    return len(chain.runs), tuple(run.peer for run in chain.runs)
