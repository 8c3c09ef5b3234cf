"""A plan's DAG for one decode step: `embed -> (project -> attend... -> mix)* -> head`.

The head also sends its token to the embedding of the next step. The DAG has no edge for this, since the edge would close a cycle.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from itertools import product

import msgspec

from meshd.planner.model import cost
from meshd.planner.problem import PlanInput
from meshd.planner.shards import Span, check_shards, check_tiling, unsound_plan
from meshd.types import AttentionShard, LayerRange, ModelSpec, PeerId, StagePlan


class NodeKind(StrEnum):
    """What a node computes."""

    EMBED = "embed"
    PROJECT = "project"
    """Norm, and the projections to q, k and v."""
    ATTEND = "attend"
    """Attention over the KV of some heads and tokens."""
    MIX = "mix"
    """Merge of the partial attention results, output projection and MLP."""
    HEAD = "head"


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One computation on one peer."""

    id: int
    """Index of the node in `Dag.nodes`."""
    kind: NodeKind
    peer: PeerId
    layer: int | None = None
    kv_heads: tuple[int, int] | None = None
    """KV heads `[first, last)` of an ATTEND node."""
    tokens: tuple[int, int] | None = None
    """Tokens `[first, last)` of an ATTEND node."""
    seconds: float = 0.0
    """Predicted time for one token."""


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """Data that one node sends to another."""

    source: int
    target: int
    bytes_per_token: int
    seconds: float
    """Predicted time for one token; 0 if both nodes are on one peer."""


class Dag(msgspec.Struct, frozen=True):
    """A plan's nodes, in topological order, and its edges."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def draw(problem: PlanInput, stages: Sequence[StagePlan]) -> Dag:
    """Build the DAG of these stages, with predicted times.

    Raises: InvalidRequest if shards do not cover a layer exactly once; NoPeer if a peer has no profile.
    """
    for stage in stages:
        check_shards(stage, problem.card.spec, problem.context)
    return _DagBuilder(problem).build(stages)


def validate(dag: Dag, spec: ModelSpec, context: int) -> None:
    """Check that every node follows its inputs, and that every layer is computed once and with its whole attention.

    Raises: InvalidRequest.
    """
    if [node.id for node in dag.nodes] != list(range(len(dag.nodes))):
        raise unsound_plan("its nodes are not numbered in order")
    if any(not 0 <= edge.source < edge.target < len(dag.nodes) for edge in dag.edges):
        raise unsound_plan("an edge goes backwards: it has a cycle")
    reached = {0, *(edge.target for edge in dag.edges)}
    if len(reached) != len(dag.nodes):
        raise unsound_plan("a node has no input")
    kinds = Counter((node.kind, node.layer) for node in dag.nodes if node.kind is not NodeKind.ATTEND)
    layers = range(spec.layers)
    once = [(NodeKind.EMBED, None), (NodeKind.HEAD, None), *product((NodeKind.PROJECT, NodeKind.MIX), layers)]
    if kinds != Counter(once):
        raise unsound_plan("a layer is missing or computed twice")
    for layer in layers:
        parts = [(node.kv_heads, node.tokens) for node in dag.nodes if node.kind is NodeKind.ATTEND and node.layer == layer]
        check_tiling(parts, spec.kv_heads, context, layer)


class _DagBuilder:
    """Builds the DAG of one plan, node by node."""

    def __init__(self, problem: PlanInput) -> None:
        self._problem, self._spec = problem, problem.card.spec
        self._nodes: list[Node] = []
        self._edges: list[Edge] = []

    def build(self, stages: Sequence[StagePlan]) -> Dag:
        last = self._node(NodeKind.EMBED, stages[0].peer)
        for stage in stages:
            times = cost.layer_decode_s(self._problem.profile(stage.peer), self._problem.card)
            times[stage.layers.start] += self._problem.profile(stage.peer).step_overhead_s
            for layer in stage.layers:
                last = self._layer(stage, layer, float(times[layer]), last)
        profile = self._problem.profile(stages[-1].peer)
        head = self._node(NodeKind.HEAD, profile.id, seconds=cost.head_s(profile, self._problem.card))
        self._edge(last, head, self._problem.activation_bytes)
        return Dag(tuple(self._nodes), tuple(self._edges))

    def _layer(self, stage: StagePlan, layer: int, seconds: float, before: Node) -> Node:
        share, hidden = cost.project_share(self._spec), self._problem.activation_bytes
        project = self._node(NodeKind.PROJECT, stage.peer, layer, seconds=seconds * share)
        self._edge(before, project, hidden)
        parts = [(shard, self._attend(shard, layer)) for shard in _shards(stage, layer)]
        for shard, attend in parts:
            self._edge(project, attend, cost.shard_wire_bytes(shard, self._spec, self._problem.wire_element_bytes)[0])
        mix = self._node(NodeKind.MIX, stage.peer, layer, seconds=seconds * (1 - share))
        self._edge(project, mix, hidden)
        for shard, attend in parts:
            self._edge(attend, mix, cost.shard_wire_bytes(shard, self._spec, self._problem.wire_element_bytes)[1])
        return mix

    def _attend(self, shard: AttentionShard, layer: int) -> Node:
        position = self._problem.position
        positions = cost.shard_fraction(shard, self._spec, position) * position
        seconds = cost.attention_decode_s(self._problem.profile(shard.peer), positions, self._problem.kv_token_layer_bytes)
        heads, tokens = shard.kv_heads or (0, self._spec.kv_heads), shard.tokens or (0, self._problem.context)
        return self._node(NodeKind.ATTEND, shard.peer, layer, kv_heads=heads, tokens=tokens, seconds=seconds)

    def _node(
        self,
        kind: NodeKind,
        peer: PeerId,
        layer: int | None = None,
        *,
        kv_heads: Span | None = None,
        tokens: Span | None = None,
        seconds: float = 0.0,
    ) -> Node:
        node = Node(id=len(self._nodes), kind=kind, peer=peer, layer=layer, kv_heads=kv_heads, tokens=tokens, seconds=seconds)
        self._nodes.append(node)
        return node

    def _edge(self, source: Node, target: Node, size: int) -> None:
        seconds = self._problem.network.hop_s(source.peer, target.peer, size)
        self._edges.append(Edge(source=source.id, target=target.id, bytes_per_token=size, seconds=seconds))


def _shards(stage: StagePlan, layer: int) -> list[AttentionShard]:
    """Return the layer's shards. A layer without shards is returned as one shard with all its KV on the stage's own peer."""
    whole = AttentionShard(peer=stage.peer, layers=LayerRange(layer, layer + 1))
    return [shard for shard in stage.attention if layer in shard.layers] or [whole]
