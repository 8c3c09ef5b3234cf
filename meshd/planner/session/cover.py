"""The cheapest chain of stages over a run of layers when peers may come again: Viterbi over the cuts.

`chains` lets a peer take one run, as a new plan should. To mend a plan that is not so: what survives stays where it is, and who is
left fills the gaps. Without that rule the search is small, and quick enough to run while a client waits:

    tails[c, p, f] = min over d > c of  stage[p, c, d] + (min over q of  link[p, q] + tails[d, q, f])

is the best chain over layers [c, L) that starts at peer p, if the whole chain started at f (for the token's way back).
"""

from dataclasses import dataclass

import numpy as np

from meshd.planner.chain import Array, Chain, LayerRun


@dataclass(frozen=True, slots=True)
class CoverCosts:
    """The terms of a chain over some layers, cuts counted from the first of them. All are added up; inf: not possible."""

    stage: Array
    """`[peers, cuts, cuts]`: layers `[a, b)` on a peer; inf wherever b <= a."""
    link: Array
    """`[peers, peers]`: from a stage to the next one's peer."""
    before: Array | None = None
    """`[peers]`: the way to the first stage; None: free."""
    after: Array | None = None
    """`[peers]`: the way on from the last stage; None: free."""
    back: Array | None = None
    """`[peers, peers]`: from the last stage to the first; None: does not count."""


def cover(gap: CoverCosts) -> Chain | None:
    """The cheapest chain, among equals that of the lowest peers and the longest runs; None: some layer has nobody."""
    peers, cuts = gap.stage.shape[:2]
    ends = np.zeros((peers, 1)) if gap.after is None else gap.after[:, None]
    ends = ends if gap.back is None else ends + gap.back
    tails = np.full((cuts, *ends.shape), np.inf)
    onward = np.full((cuts, *ends.shape), np.inf)
    onward[-1] = ends
    for cut in range(cuts - 2, -1, -1):
        tails[cut] = (gap.stage[:, cut, cut + 1 :, None] + onward[cut + 1 :].transpose(1, 0, 2)).min(axis=1)
        onward[cut] = (gap.link[:, :, None] + tails[cut][None]).min(axis=1)
    whole = tails[0, :, 0] if gap.back is None else np.diagonal(tails[0])
    whole = whole if gap.before is None else whole + gap.before
    first = int(np.argmin(whole))
    if not np.isfinite(whole[first]):
        return None
    return Chain(float(whole[first]), tuple(_walk(gap, tails, onward, first)))


def _walk(gap: CoverCosts, tails: Array, onward: Array, peer: int) -> list[LayerRun]:
    last = len(tails) - 1
    seen_from = 0 if gap.back is None else peer
    runs: list[LayerRun] = []
    cut = 0
    while True:
        rest = gap.stage[peer, cut, cut + 1 :] + onward[cut + 1 :, peer, seen_from]
        end = last - int(np.argmin(rest[::-1]))
        runs.append(LayerRun(peer, cut, end))
        if end == last:
            return runs
        peer, cut = int(np.argmin(gap.link[peer] + tails[end, :, seen_from])), end
