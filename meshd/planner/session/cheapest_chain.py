"""Find the cheapest chain over some layers when a peer may have several stages: the Viterbi algorithm (1967) over the cuts.

A new plan gives each peer at most one run of layers (`meshd.planner.search.exact`). The changed plan of a running session may give
a peer several runs: the surviving stages stay, and any peers fill the gaps. Without the rule of one run per peer, the search is
fast enough to run while a client waits. The cost of the cheapest chain over layers [c, L) that starts at peer p is:

    tails[c, p, f] = min over d > c of  stage[p, c, d] + (min over q of  link[p, q] + tails[d, q, f])

The first peer f of the whole chain is needed for the link from the last stage back to f.
"""

from dataclasses import dataclass

import numpy as np

from meshd.planner.chain import Array, Chain, LayerRun


@dataclass(frozen=True, slots=True)
class CoverCosts:
    """Costs of stages and links; a chain costs their sum. Cut 0 is before the first layer to cover. inf: not possible."""

    stage: Array
    """Cost of layers `[a, b)` on a peer: `[peers, cuts, cuts]`; inf where b <= a."""
    link: Array
    """Cost of the link between the peers of consecutive stages: `[peers, peers]`."""
    before: Array | None = None
    """Cost of the link to the first stage, by the peer of this stage: `[peers]`. None: free."""
    after: Array | None = None
    """Cost of the link from the last stage, by the peer of this stage: `[peers]`. None: free."""
    back: Array | None = None
    """Cost of the link from the last stage to the first: `[peers, peers]`. None: free."""


def cover(costs: CoverCosts) -> Chain | None:
    """Find the cheapest chain. Of equally cheap chains, take the one with the lowest peer indices and the longest runs.

    Returns: the chain; None if there is none, for example because no peer can take a layer.
    """
    peers, cuts = costs.stage.shape[:2]
    ends = np.zeros((peers, 1)) if costs.after is None else costs.after[:, None]
    ends = ends if costs.back is None else ends + costs.back
    tails = np.full((cuts, *ends.shape), np.inf)
    onward = np.full((cuts, *ends.shape), np.inf)
    onward[-1] = ends
    for cut in range(cuts - 2, -1, -1):
        tails[cut] = (costs.stage[:, cut, cut + 1 :, None] + onward[cut + 1 :].transpose(1, 0, 2)).min(axis=1)
        onward[cut] = (costs.link[:, :, None] + tails[cut][None]).min(axis=1)
    whole = tails[0, :, 0] if costs.back is None else np.diagonal(tails[0])
    whole = whole if costs.before is None else whole + costs.before
    first = int(np.argmin(whole))
    if not np.isfinite(whole[first]):
        return None
    return Chain(float(whole[first]), tuple(_trace(costs, tails, onward, first)))


def _trace(costs: CoverCosts, tails: Array, onward: Array, peer: int) -> list[LayerRun]:
    last = len(tails) - 1
    origin = 0 if costs.back is None else peer
    runs: list[LayerRun] = []
    cut = 0
    while True:
        rest = costs.stage[peer, cut, cut + 1 :] + onward[cut + 1 :, peer, origin]
        end = last - int(np.argmin(rest[::-1]))
        runs.append(LayerRun(peer, cut, end))
        if end == last:
            return runs
        peer, cut = int(np.argmin(costs.link[peer] + tails[end, :, origin])), end
