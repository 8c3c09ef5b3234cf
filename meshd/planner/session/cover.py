"""The cheapest chain of stages over a run of layers when a peer may have several stages: Viterbi over the cuts.

A new plan gives a peer one run of layers (`meshd.planner.search.chains`). A repaired one need not: surviving stages stay where
they are, and the other peers fill the gaps. Without that rule the search is small enough to run while a client waits:

    tails[c, p, f] = min over d > c of  stage[p, c, d] + (min over q of  link[p, q] + tails[d, q, f])

is the best chain over layers [c, L) that starts at peer p, if the whole chain started at f (for the token's way back).
"""

from dataclasses import dataclass

import numpy as np

from meshd.planner.chain import Array, Chain, LayerRun


@dataclass(frozen=True, slots=True)
class CoverCosts:
    """Costs of a chain over some layers, with cuts counted from the first of them. They are summed; inf: not possible."""

    stage: Array
    """`[peers, cuts, cuts]`: layers `[a, b)` on a peer; inf wherever b <= a."""
    link: Array
    """`[peers, peers]`: from a stage to the next one's peer."""
    before: Array | None = None
    """`[peers]`: the link to the first stage; None: free."""
    after: Array | None = None
    """`[peers]`: the link from the last stage; None: free."""
    back: Array | None = None
    """`[peers, peers]`: from the last stage to the first; None: does not count."""


def cover(costs: CoverCosts) -> Chain | None:
    """Find the cheapest chain; among equals that of the lowest peers and the longest runs.

    Returns: None if no peer can take some layer.
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
    return Chain(float(whole[first]), tuple(_walk(costs, tails, onward, first)))


def _walk(costs: CoverCosts, tails: Array, onward: Array, peer: int) -> list[LayerRun]:
    last = len(tails) - 1
    seen_from = 0 if costs.back is None else peer
    runs: list[LayerRun] = []
    cut = 0
    while True:
        rest = costs.stage[peer, cut, cut + 1 :] + onward[cut + 1 :, peer, seen_from]
        end = last - int(np.argmin(rest[::-1]))
        runs.append(LayerRun(peer, cut, end))
        if end == last:
            return runs
        peer, cut = int(np.argmin(costs.link[peer] + tails[end, :, seen_from])), end
