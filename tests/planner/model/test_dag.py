import msgspec
import pytest

from in_process.clusters import make_card, make_peer, make_problem
from meshd.errors import InvalidRequest
from meshd.planner.model.dag import Dag, NodeKind, draw, validate
from meshd.planner.model.estimate import estimate
from meshd.planner.problem import PlanInput
from meshd.types import AttentionShard, LayerRange, StagePlan

PEERS = (make_peer("a"), make_peer("b", decode_gb_s=4.0), make_peer("c", attention_gb_s=50.0))


@pytest.fixture
def problem() -> PlanInput:
    return make_problem(*PEERS, card=make_card(4), context=100)


def stages(*attention: AttentionShard) -> tuple[StagePlan, ...]:
    second = StagePlan(peer=PEERS[1].id, layers=LayerRange(2, 4), attention=attention)
    return StagePlan(peer=PEERS[0].id, layers=LayerRange(0, 2)), second


def shard(
    peer: int, layers: tuple[int, int], heads: tuple[int, int] | None = None, tokens: tuple[int, int] | None = None
) -> AttentionShard:
    return AttentionShard(peer=PEERS[peer].id, layers=LayerRange(*layers), kv_heads=heads, tokens=tokens)


SHARDED = (shard(2, (2, 3), (0, 2)), shard(1, (2, 3), (2, 3), (0, 60)), shard(0, (2, 3), (2, 3), (60, 100)))


def test_without_shards_each_stage_computes_its_own_attention(problem: PlanInput) -> None:
    dag = draw(problem, stages())
    kinds = [node.kind for node in dag.nodes]
    assert kinds == [NodeKind.EMBED, *[NodeKind.PROJECT, NodeKind.ATTEND, NodeKind.MIX] * 4, NodeKind.HEAD]
    assert [node.peer for node in dag.nodes] == [PEERS[0].id] * 7 + [PEERS[1].id] * 7
    crossing = [edge for edge in dag.edges if edge.seconds > 0]
    assert [edge.bytes_per_token for edge in crossing] == [problem.activation_bytes]
    validate(dag, problem.card.spec, problem.context)


def longest_path_s(dag: Dag) -> float:
    """Return the seconds of the longest path, over nodes and edges."""
    done: dict[int, float] = {}
    for node in dag.nodes:
        entering = (done[edge.source] + edge.seconds for edge in dag.edges if edge.target == node.id)
        done[node.id] = max(entering, default=0.0) + node.seconds
    return max(done.values())


@pytest.mark.parametrize("attention", [(), SHARDED])
def test_the_longest_path_is_the_predicted_time_per_token(problem: PlanInput, attention: tuple[AttentionShard, ...]) -> None:
    plan = stages(*attention)
    dag, predicted = draw(problem, plan), estimate(problem, plan)
    validate(dag, problem.card.spec, problem.context)
    assert longest_path_s(dag) == pytest.approx(predicted.tpot_s - predicted.back.decode_s)


def test_shards_become_nodes_with_edges_both_ways(problem: PlanInput) -> None:
    dag = draw(problem, stages(*SHARDED))
    attends = [node for node in dag.nodes if node.kind is NodeKind.ATTEND and node.layer == 2]
    assert [(node.peer, node.kv_heads, node.tokens) for node in attends] == [
        (PEERS[2].id, (0, 2), (0, 100)),
        (PEERS[1].id, (2, 3), (0, 60)),
        (PEERS[0].id, (2, 3), (60, 100)),
    ]
    for node in attends:
        ways = [edge for edge in dag.edges if node.id in (edge.source, edge.target)]
        assert len(ways) == 2
        assert all((edge.seconds > 0) == (node.peer != PEERS[1].id) for edge in ways)


def broken(dag: Dag) -> list[Dag]:
    """Return copies of the DAG, each with one fault."""
    nodes, edges = list(dag.nodes), list(dag.edges)
    replace = msgspec.structs.replace
    return [
        Dag(tuple(nodes[:-1]), tuple(edges[:-1])),
        Dag((*nodes[:4], replace(nodes[4], layer=0), *nodes[5:]), tuple(edges)),
        Dag(tuple(nodes), (replace(edges[0], source=edges[0].target, target=edges[0].source), *edges[1:])),
        Dag(tuple(nodes), tuple(edges[1:])),
        Dag(tuple(reversed(nodes)), tuple(edges)),
        Dag((*nodes[:2], replace(nodes[2], tokens=(0, 50)), *nodes[3:]), tuple(edges)),
        Dag((*nodes[:2], replace(nodes[2], layer=1), *nodes[3:]), tuple(edges)),
    ]


@pytest.mark.parametrize("fault", range(7))
def test_a_broken_dag_is_refused(problem: PlanInput, fault: int) -> None:
    with pytest.raises(InvalidRequest, match="not sound"):
        validate(broken(draw(problem, stages()))[fault], problem.card.spec, problem.context)


def test_shards_that_leave_a_gap_are_refused(problem: PlanInput) -> None:
    with pytest.raises(InvalidRequest, match="KV head 2 from token 0 on is covered by no part"):
        draw(problem, stages(shard(2, (2, 3), (0, 2))))
