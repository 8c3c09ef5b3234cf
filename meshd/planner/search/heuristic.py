"""The heuristic search, for clusters with too many peers for the exact one.

For a given order of the peers, a dynamic program over peers and cuts finds the cheapest chain that keeps this order. The chain may
skip any peer. The search tries many orders in three steps:

1. A few greedy orders.
2. Random changes of the best order, by the moves of Pipette (Yim et al., 2024): insert, swap, reverse a segment.
3. The exact search among the best chain's peers and a few other peers, one group of other peers after another, until no group
   improves the chain.

The limits are numbers of orders and of exact searches, not times, and the random seed is fixed. So the same problem always has the
same plan.
"""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np

from meshd.planner.chain import Array, Chain, LayerRun
from meshd.planner.search.exact import ChainCosts, exact_search, prepend, runs_by_length
from meshd.planner.search.limits import TIE, SearchLimits

ORDERS_TRIED = 120
"""Most randomly changed orders that are tried for one problem."""
EXACT_SEARCHES = 60
"""Most exact searches for one problem."""
GROUP = 7
"""Most peers in one of these exact searches."""

Order = tuple[int, ...]


class HeuristicSearch:
    """A `Search` for one problem. Later calls, with other costs, start from the best orders of earlier calls."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self._elite: list[Order] = []
        self._orders_left = ORDERS_TRIED
        self._exact_searches_left = EXACT_SEARCHES

    def __call__(self, costs: ChainCosts, limits: SearchLimits) -> Chain | None:
        """Find a cheap chain within the limits. Returns: the chain; None if none was found."""
        orders = list(dict.fromkeys([*self._elite, *_greedy_orders(costs)])) if not self._elite else self._elite
        best: Chain | None = None
        for order in orders:
            best = _cheaper(best, best_in_order(costs, order, limits))
        best = self._try_moves(costs, limits, best, orders[0])
        best = self._try_groups(costs, limits, best)
        if best is not None:
            self._elite = [_starting_with(best, costs.peers), *self._elite[:3]]
        return best

    def _try_moves(self, costs: ChainCosts, limits: SearchLimits, best: Chain | None, start: Order) -> Chain | None:
        one_way = replace(costs, back=None)
        steps = self._orders_left // 2
        self._orders_left -= steps
        order = _starting_with(best, costs.peers) if best else start
        for _ in range(steps):
            moved = _move(order, self._random)
            found = best_in_order(one_way, moved, limits)
            if found is None:
                continue
            found = Chain(chain_value(costs, found.runs), found.runs)
            if best is None or found.value <= best.value * (1 + TIE):
                best, order = _cheaper(best, found), moved
        return best

    def _try_groups(self, costs: ChainCosts, limits: SearchLimits, best: Chain | None) -> Chain | None:
        improved = True
        while improved and best is not None and len(best.runs) < GROUP:
            improved = False
            inside = [run.peer for run in best.runs]
            outside = [peer for peer in _by_speed(costs) if peer not in inside]
            places = GROUP - len(inside)
            for first in range(0, len(outside), places):
                if self._exact_searches_left == 0:
                    return best
                self._exact_searches_left -= 1
                found = _search_among(costs, limits, sorted(inside + outside[first : first + places]))
                if found is not None and found.value < best.value * (1 - TIE):
                    best, improved = found, True
                    break
        return best


def best_in_order(costs: ChainCosts, order: Order, limits: SearchLimits) -> Chain | None:
    """Find the cheapest chain within the limits whose peers come in this order. Returns: the chain; None if there is none."""
    if limits.forbid is None:
        return _InOrder(costs, order, limits).best()
    best: Chain | None = None
    for peer in sorted(limits.forbid):
        without = tuple(other for other in order if other != peer)
        best = _cheaper(best, _InOrder(costs, without, replace(limits, forbid=None)).best())
    return best


def chain_value(costs: ChainCosts, runs: tuple[LayerRun, ...]) -> float:
    """Compute the cost of a chain."""
    terms = [float(costs.stage[run]) for run in runs]
    terms += [float(costs.link[one.peer, other.peer]) for one, other in pairwise(runs)]
    if costs.back is not None:
        terms.append(float(costs.back[runs[-1].peer, runs[0].peer]))
    return max(terms) if costs.worst else sum(terms)


class _InOrder:
    """The dynamic program for one order of the peers.

    `tails[t, q, e, c]` is the cost of the cheapest chain of q + 1 peers over layers [c, L) that starts at peer `order[t]` and ends
    at peer `order[e]`. The last q also includes chains of more peers, unless the limits ask for an exact number.
    """

    def __init__(self, costs: ChainCosts, order: Order, limits: SearchLimits) -> None:
        self._costs, self._order = costs, order
        self._counts = limits.exactly or limits.least
        self._or_more = limits.exactly is None
        self._required = [place for place, peer in enumerate(order) if peer in limits.require]
        self._complete = limits.require <= set(order)
        ends = 1 if costs.back is None else len(order)
        self._tails = np.full((len(order), self._counts, ends, costs.layers + 1), np.inf)
        self._fill()

    def best(self) -> Chain | None:
        if not self._order or not self._complete:
            return None
        whole = self._tails[:, -1, :, 0].copy()
        if self._costs.back is not None:
            whole = self._costs.join(whole, self._costs.back[np.ix_(self._order, self._order)].T)
        if self._required:
            whole[self._required[0] + 1 :] = np.inf
        place, end = np.unravel_index(np.argmin(whole), whole.shape)
        value = float(whole[place, end])
        if not np.isfinite(value):
            return None
        return Chain(value, tuple(self._trace(int(place), int(end))))

    def _fill(self) -> None:
        runs = runs_by_length(self._costs)
        for place in reversed(range(len(self._order))):
            peer, tails = self._order[place], self._tails[place]
            if self._may_end(place):
                tails[0, 0 if tails.shape[1] == 1 else place] = self._costs.stage[peer, :, -1]
            onward = self._onward(place)
            if onward is None:
                continue
            longer = prepend(self._costs, peer, runs[peer], onward.min(axis=0))
            np.minimum(tails[1:], longer[:-1], out=tails[1:])
            if self._or_more:
                np.minimum(tails[-1], longer[-1], out=tails[-1])

    def _may_end(self, place: int) -> bool:
        return not self._required or place >= self._required[-1]

    def _onward(self, place: int) -> Array | None:
        """Return the costs of what may follow the peer at `place`: the link to each possible follower, and the follower's tails.

        Returns: `[followers, counts, ends, cuts]`; None if no peer may follow.
        """
        stop = next((needed for needed in self._required if needed > place), len(self._order) - 1)
        if stop == place:
            return None
        followers = list(self._order[place + 1 : stop + 1])
        link = self._costs.link[self._order[place]][followers]
        return self._costs.join(link[:, None, None, None], self._tails[place + 1 : stop + 1])

    def _trace(self, place: int, end: int) -> list[LayerRun]:
        costs, count, start, runs = self._costs, self._counts - 1, 0, []
        while True:
            peer = self._order[place]
            stop = self._ending(place, count, end, start)
            onward = self._onward(place)
            if onward is not None:
                counts = [before for before in (count - 1, count) if before >= 0 and (before < count or self._saturated(count))]
                values = costs.join(costs.stage[peer, start][None, None, :], onward[:, counts, end])
                if values.size and values.min() < stop:
                    follower, which, cut = np.unravel_index(np.argmin(values), values.shape)
                    runs.append(LayerRun(peer, start, int(cut)))
                    place, count, start = place + 1 + int(follower), counts[int(which)], int(cut)
                    continue
            return [*runs, LayerRun(peer, start, costs.layers)]

    def _saturated(self, count: int) -> bool:
        return self._or_more and count == self._counts - 1

    def _ending(self, place: int, count: int, end: int, start: int) -> float:
        here = self._tails.shape[2] == 1 or end == place
        if not here or count > 0 or not self._may_end(place):
            return float("inf")
        return float(self._costs.stage[self._order[place], start, -1])


def _greedy_orders(costs: ChainCosts) -> list[Order]:
    """Make the orders that the search starts with.

    The first has the fastest peers first. The second has first the peers whose stages can end at the most cuts. Up to five more
    orders each start at one of the five fastest peers, and always continue with the peer that has the cheapest link from the
    previous peer.
    """
    speed = _by_speed(costs)
    ends = np.isfinite(costs.stage).any(axis=1).sum(axis=1)
    orders = [tuple(speed), tuple(sorted(speed, key=lambda peer: -ends[peer]))]
    for start in speed[:5]:
        order, left = [start], [peer for peer in speed if peer != start]
        while left:
            nearest = min(left, key=lambda peer: costs.link[order[-1], peer])
            order.append(nearest)
            left.remove(nearest)
        orders.append(tuple(order))
    return orders


def _by_speed(costs: ChainCosts) -> list[int]:
    lengths = np.arange(costs.layers + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_layer = costs.stage / (lengths[None, None, :] - lengths[None, :, None])
    cheapest = np.where(np.isfinite(costs.stage), per_layer, np.inf).min(axis=(1, 2))
    return sorted(range(costs.peers), key=lambda peer: cheapest[peer])


def _move(order: Order, rng: random.Random) -> Order:
    one, other = sorted(rng.sample(range(len(order)), 2))
    moved = list(order)
    kind = rng.randrange(4)
    if kind == 0:
        moved.insert(one, moved.pop(other))
    elif kind == 1:
        moved.insert(other, moved.pop(one))
    elif kind == 2:
        moved[one], moved[other] = moved[other], moved[one]
    else:
        moved[one : other + 1] = reversed(moved[one : other + 1])
    return tuple(moved)


def _search_among(costs: ChainCosts, limits: SearchLimits, peers: list[int]) -> Chain | None:
    if not limits.require <= set(peers):
        return None
    grid = np.ix_(peers, peers)
    part = ChainCosts(costs.stage[peers], costs.link[grid], None if costs.back is None else costs.back[grid], costs.worst)
    place = {peer: index for index, peer in enumerate(peers)}
    forbid = frozenset(place[peer] for peer in limits.forbid) if limits.forbid and limits.forbid <= set(peers) else None
    found = exact_search(part, replace(limits, require=frozenset(place[peer] for peer in limits.require), forbid=forbid))
    return found and Chain(found.value, tuple(LayerRun(peers[run.peer], run.start, run.end) for run in found.runs))


def _starting_with(chain: Chain, peers: int) -> Order:
    """Make an order of all peers that begins with the peers of the chain."""
    used = [run.peer for run in chain.runs]
    return tuple(used + [peer for peer in range(peers) if peer not in used])


def _cheaper(one: Chain | None, other: Chain | None) -> Chain | None:
    """Return the cheaper chain. If both cost the same, return the one with fewer peers, else `one`. None: both are None."""
    if one is None or other is None:
        return one or other
    if abs(one.value - other.value) <= TIE * one.value:
        return other if len(other.runs) < len(one.runs) else one
    return other if other.value < one.value else one
