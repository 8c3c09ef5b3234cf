"""Choose peers that load layers with too few resident copies.

The cost of a stage is the time to load it, plus its time for `TOKENS_AHEAD` tokens by the formulas of `model`. The more of a peer's
memory the layers would fill, the more the cost is scaled up. The searches for plans also find the cheapest chain of these stages.
"""

import math
from collections.abc import Collection, Sequence
from contextlib import suppress

import msgspec
import numpy as np

from meshd.errors import DoesNotFit, NoPeer
from meshd.numerics import NumericsId
from meshd.planner.chain import Array
from meshd.planner.eligible import exclusions
from meshd.planner.model.memory import RESERVE, memory_tables, stage_memory
from meshd.planner.model.tables import CostTables
from meshd.planner.network import UNMEASURED_BANDWIDTH_BYTES_S
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.planner.search.exact import ChainCosts
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.numerics import in_use
from meshd.planner.search.select import search_for
from meshd.planner.units import show_bytes
from meshd.types import LayerRange, StagePlan

TOKENS_AHEAD = 256
"""Number of tokens that a load is assumed to serve. It weighs decode time against load time."""


def repair(problem: PlanInput, missing: Sequence[LayerRange], *, kv_tokens: int) -> tuple[StagePlan, ...]:
    """Choose stages for the layers in `missing`, with KV for `kv_tokens` tokens, that fit in the peers' free memory.

    Idle standby copies of other models count as free memory; holdings of this model do not. Peers that load and decode the layers
    quickly, and peers with more free memory, are preferred.

    Returns: stages that together have exactly the layers in `missing`.
    Raises: NoPeer if no peer may take layers; DoesNotFit if memory is short.
    """
    peers = candidates(problem)
    stages: list[StagePlan] = []
    for layers in missing:
        found = _RepairSearch(problem, peers, layers, kv_tokens).search()
        stages += found
        peers = tuple(_after(problem, peer, found, kv_tokens) for peer in peers)
    return tuple(stages)


def repair_within(
    problem: PlanInput,
    missing: Sequence[LayerRange],
    *,
    kv_tokens: int,
    least_tokens: int,
    one_numerics: bool = False,
) -> tuple[tuple[StagePlan, ...], int]:
    """Choose stages as `repair` does, but halve `kv_tokens` as long as memory is short, down to `least_tokens`.

    Peers with the numerics of those that serve the model now are chosen first, even with KV for fewer tokens; with `one_numerics`,
    no others are.

    Returns: (stages, number of tokens that they have KV for).
    Raises: NoPeer if no peer may take layers; DoesNotFit if memory is short even for `least_tokens`.
    """
    own = with_numerics(problem, in_use(problem.profiles))
    if own is not problem and not one_numerics:
        with suppress(NoPeer, DoesNotFit):
            return _repair_halving(own, missing, kv_tokens, least_tokens)
    return _repair_halving(own if one_numerics else problem, missing, kv_tokens, least_tokens)


def with_numerics(problem: PlanInput, numerics: Collection[NumericsId]) -> PlanInput:
    """Leave only the peers with these ids to be chosen. Returns: the problem itself if that changes nothing, or without an id."""
    allowed = [profile.id for profile in problem.profiles if problem.peers is None or profile.id in problem.peers]
    own = tuple(peer for peer in allowed if problem.profile(peer).numerics in numerics)
    return problem if not numerics or len(own) == len(allowed) else msgspec.structs.replace(problem, peers=own)


def _repair_halving(
    problem: PlanInput, missing: Sequence[LayerRange], kv_tokens: int, least_tokens: int
) -> tuple[tuple[StagePlan, ...], int]:
    while True:
        try:
            return repair(problem, missing, kv_tokens=kv_tokens), kv_tokens
        except DoesNotFit:
            if kv_tokens <= least_tokens:
                raise
            kv_tokens = max(least_tokens, kv_tokens // 2)


def candidates(problem: PlanInput) -> tuple[PeerProfile, ...]:
    """Return the peers that may take layers, ordered by name, then id. Raises: NoPeer if there are none."""
    excluded = exclusions(problem)
    peers = [profile for profile in problem.profiles if profile.id not in excluded]
    if not peers:
        wanted = [profile for profile in problem.profiles if problem.peers is None or profile.id in problem.peers]
        why = "; ".join(f"{profile.name}: {excluded[profile.id]}" for profile in wanted)
        raise NoPeer("no live peer can take layers" + (f" ({why})" if why else ""), hint="start `meshd up` on another device")
    return tuple(sorted(peers, key=lambda profile: (profile.name, profile.id)))


class _RepairSearch:
    """The search for stages that load one run of missing layers."""

    def __init__(self, problem: PlanInput, peers: tuple[PeerProfile, ...], layers: LayerRange, kv_tokens: int) -> None:
        self._problem, self._peers, self._layers, self._kv_tokens = problem, peers, layers, kv_tokens
        self._tables = CostTables(problem, peers)
        self._memory = memory_tables(msgspec.structs.replace(problem, context=kv_tokens), peers)
        self._allowed = np.array([peer.memory_free_bytes * (1 - RESERVE) for peer in peers])

    def search(self) -> tuple[StagePlan, ...]:
        cuts = slice(self._layers.start, self._layers.end + 1)
        stage = (self._load_s() + TOKENS_AHEAD * self._tables.decode_anywhere)[:, cuts, cuts]
        memory, allowed = self._memory[:, cuts, cuts], self._allowed[:, None, None]
        # Fullness is computed as if a peer took the whole run, so that splitting the run does not make peers look emptier.
        fullness = np.minimum(1.0, memory[:, :1, -1:] / np.maximum(1.0, allowed))
        stage = np.where(memory <= allowed, stage * (1 + fullness), np.inf)
        stage[:, 0, :] += self._hops_s(self._layers.start - 1, towards=True)[:, None]
        stage[:, :, -1] += self._hops_s(self._layers.end, towards=False)[:, None]
        chain = search_for(len(self._peers))(ChainCosts(stage, TOKENS_AHEAD * self._tables.hop), SearchLimits())
        if chain is None:
            raise self._does_not_fit()
        return chain.stages(self._peers, self._layers.start)

    def _load_s(self) -> Array:
        """Predict the seconds until a stage's weights are in memory: `[peers, cuts, cuts]`.

        The weights are read from the peer's disk, or fetched over the fastest link from another peer that has some of the model.
        """
        card, count = self._problem.card, self._problem.card.spec.layers
        sizes = np.concatenate(([0.0], np.cumsum(np.asarray(card.layer_bytes, dtype=np.float64))))
        weights = sizes[None, :] - sizes[:, None]
        weights[0, :] += card.embedding_bytes
        weights[:, count] += card.head_bytes
        speeds = np.array([self._load_bytes_s(peer) for peer in self._peers])
        seconds: Array = np.maximum(0.0, weights)[None] / speeds[:, None, None]
        return seconds

    def _load_bytes_s(self, peer: PeerProfile) -> float:
        disk = peer.rates.disk_bytes_s
        disk = disk if math.isfinite(disk) and disk > 0 else UNMEASURED_BANDWIDTH_BYTES_S
        if peer.stored:
            return disk
        network = self._problem.network
        sources = [other.id for other in self._problem.profiles if other.id != peer.id and (other.stored or other.holdings)]
        links = [network.link(source, peer.id).bandwidth_bytes_s for source in sources]
        return min(disk, max(links, default=UNMEASURED_BANDWIDTH_BYTES_S))

    def _hops_s(self, layer: int, *, towards: bool) -> Array:
        """Predict the seconds of `TOKENS_AHEAD` hops between each peer and the nearest holder of `layer`; 0 if no peer holds it.

        `towards`: hops go from the holder to the peer, otherwise from the peer to the holder.
        """
        problem = self._problem
        holders = [peer.id for peer in problem.profiles if any(layer in holding.layers for holding in peer.usable_holdings)]
        pairs = [[(other, peer.id) if towards else (peer.id, other) for other in holders] for peer in self._peers]
        hops = [[problem.network.hop_s(*pair, problem.activation_bytes) for pair in row] for row in pairs]
        return TOKENS_AHEAD * np.array([min(row, default=0.0) for row in hops])

    def _does_not_fit(self) -> DoesNotFit:
        layers = self._layers
        takes = self._memory[:, layers.start, layers.end]
        best = int(np.argmax(self._allowed - takes))
        needed, allowed = float(takes[best]), float(self._allowed[best])
        name = self._peers[best].name
        return DoesNotFit(
            f"layers {layers} of {self._problem.card.name} fit nowhere: they need {show_bytes(needed)} with KV"
            f" for {self._kv_tokens} tokens on {name}, which may take {show_bytes(allowed)} and comes closest",
            missing_bytes=max(1, math.ceil(needed - allowed)),
            hint="start `meshd up` on another device, or allow more `--memory`",
        )


def _after(problem: PlanInput, peer: PeerProfile, stages: Sequence[StagePlan], kv_tokens: int) -> PeerProfile:
    """Return the peer's profile after the peer has loaded its own stages among `stages`."""
    asked = msgspec.structs.replace(problem, context=kv_tokens)
    taken = sum(stage_memory(asked, stage).total_bytes for stage in stages if stage.peer == peer.id)
    left = peer.memory_free_bytes - math.ceil(taken / (1 - RESERVE))  # so the reserve stays a share of what was free before
    return msgspec.structs.replace(peer, memory_free_bytes=max(0, left))
