"""Costs of every possible stage and hop, as arrays for the searches.

Cuts are numbered 0 to `layers`, and layers `[a, b)` are entry (a, b) of a table. The formulas are those of `cost` and `memory`.
"""

from functools import cached_property

import numpy as np

from meshd.planner.chain import Array
from meshd.planner.model import cost
from meshd.planner.model.memory import allowed_bytes, capacity_bytes, memory_tables
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile


class CostTables:
    """The tables for one problem and the peers that may be in its plan. Each table is computed at its first use."""

    def __init__(self, problem: PlanInput, peers: tuple[PeerProfile, ...]) -> None:
        self.problem = problem
        self.peers = peers

    @cached_property
    def memory(self) -> Array:
        """Bytes of a stage on each peer: `[peers, cuts, cuts]`."""
        return memory_tables(self.problem, self.peers)

    @cached_property
    def possible(self) -> Array:
        """0 where a peer may take the stage, inf where it may not: `[peers, cuts, cuts]`."""
        if self.problem.resident_only:
            allowed = np.stack([self._resident(peer) for peer in self.peers])
        else:
            most = np.array([allowed_bytes(self.problem, peer) for peer in self.peers])
            allowed = self.memory <= most[:, None, None]
        return np.where(allowed, 0.0, np.inf)

    @cached_property
    def share(self) -> Array:
        """Share of a peer's capacity that a stage takes, inf where the peer may not take it: `[peers, cuts, cuts]`."""
        capacity = np.array([max(1, capacity_bytes(self.problem, peer)) for peer in self.peers], dtype=np.float64)
        return self.memory / capacity[:, None, None] + self.possible

    @cached_property
    def decode(self) -> Array:
        """Seconds of a stage for one token, inf where the peer may not take it: `[peers, cuts, cuts]`."""
        decode: Array = self.decode_anywhere + self.possible
        return decode

    @cached_property
    def decode_anywhere(self) -> Array:
        """Like `decode`, but finite where the peer may not take the stage."""
        card, position, kv = self.problem.card, self.problem.position, self.problem.kv_token_layer_bytes
        layers = np.stack([cost.layer_decode_s(peer, card) + cost.attention_decode_s(peer, position, kv) for peer in self.peers])
        return self._with_head(range_sums(layers) + self._overhead)

    @cached_property
    def chunk(self) -> Array:
        """Seconds of a stage for one prefill chunk, inf where the peer may not take it: `[peers, cuts, cuts]`."""
        tokens, count = cost.chunking(self.problem.prompt_tokens, self.problem.chunk_tokens)
        first = mean_chunk_start(tokens, count)
        layers = np.stack([cost.layer_prefill_s(peer, self.problem.card, tokens, first) for peer in self.peers])
        return range_sums(layers) + self._overhead + self.possible

    @cached_property
    def first_chunk(self) -> Array:
        """`chunk` plus the head's time on the last stage. The head runs once in a prefill, so only one chunk counts it."""
        return self._with_head(self.chunk.copy())

    @cached_property
    def energy(self) -> Array:
        """Joules of a stage for one token, inf where the peer may not take it: `[peers, cuts, cuts]`."""
        joules: Array = self.decode * self.power[:, None, None]
        return joules

    @cached_property
    def power(self) -> Array:
        return np.array([peer.power_w if peer.power_w is not None else np.nan for peer in self.peers])

    @cached_property
    def hop(self) -> Array:
        """Seconds to send one token's activation from one peer to another: `[peers, peers]`."""
        return self.links(self.problem.activation_bytes)

    @cached_property
    def chunk_hop(self) -> Array:
        """Seconds to send a prefill chunk's activations from one peer to another: `[peers, peers]`."""
        tokens, _ = cost.chunking(self.problem.prompt_tokens, self.problem.chunk_tokens)
        return self.links(tokens * self.problem.activation_bytes)

    @cached_property
    def back(self) -> Array:
        """Seconds of the message that returns the token from the last stage to the first: `[peers, peers]`."""
        return self.links(cost.TOKEN_MESSAGE_BYTES)

    def links(self, size_bytes: int) -> Array:
        """Return the seconds to send a message of this size from one peer to another: `[peers, peers]`."""
        network = self.problem.network
        return np.array([[network.hop_s(one.id, other.id, size_bytes) for other in self.peers] for one in self.peers])

    @cached_property
    def _overhead(self) -> Array:
        """Seconds of a step beside its computation: `[peers, 1, 1]`."""
        return np.array([peer.step_overhead_s for peer in self.peers])[:, None, None]

    def _with_head(self, table: Array) -> Array:
        table[:, :, -1] += np.array([cost.head_s(peer, self.problem.card) for peer in self.peers])[:, None]
        return table

    def _resident(self, peer: PeerProfile) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        cuts = self.problem.card.spec.layers + 1
        allowed = np.zeros((cuts, cuts), dtype=bool)
        for holding in peer.usable_holdings:
            if holding.kv_tokens_free >= self.problem.context:
                cuts_inside = slice(holding.layers.start, holding.layers.end + 1)
                allowed[cuts_inside, cuts_inside] = True
        return np.triu(allowed, 1)


def mean_chunk_start(tokens: int, chunks: float) -> float:
    """Return the number of tokens before a chunk, as a mean over the chunks of a prompt. `tokens`: tokens per chunk."""
    return tokens * (chunks - 1) / 2


def range_sums(layers: Array) -> Array:
    """Sum the values of layers over every run `[a, b)`: `[peers, layers]` to `[peers, cuts, cuts]`, inf where b <= a."""
    peers, count = layers.shape
    total = np.concatenate([np.zeros((peers, 1)), np.cumsum(layers, axis=1)], axis=1)
    table: Array = total[:, None, :] - total[:, :, None]
    low = np.tril_indices(count + 1)
    table[:, low[0], low[1]] = np.inf
    return table
