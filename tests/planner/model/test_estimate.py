from itertools import pairwise

import msgspec
import pytest

from in_process.clusters import make_card, make_peer, make_problem
from meshd.errors import NoPeer
from meshd.planner.model.estimate import estimate, peer_memory
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.types import AttentionShard, LayerRange, StagePlan

PEERS = (make_peer("a", power_w=5.0), make_peer("b", decode_gb_s=4.0, power_w=20.0), make_peer("c", attention_gb_s=50.0))


def shard(peer: int, layers: tuple[int, int], heads: tuple[int, int], tokens: tuple[int, int] | None = None) -> AttentionShard:
    return AttentionShard(peer=PEERS[peer].id, layers=LayerRange(*layers), kv_heads=heads, tokens=tokens)


SHARDED = (shard(2, (2, 3), (0, 2)), shard(1, (2, 3), (2, 3), (0, 60)), shard(0, (2, 3), (2, 3), (60, 100)))


@pytest.fixture
def problem() -> PlanInput:
    return make_problem(*PEERS, card=make_card(4), context=100)


def stages(*attention: AttentionShard, cuts: tuple[int, ...] = (0, 2, 4)) -> tuple[StagePlan, ...]:
    parts = [StagePlan(peer=peer.id, layers=LayerRange(*cut)) for peer, cut in zip(PEERS, pairwise(cuts), strict=False)]
    return (*parts[:-1], msgspec.structs.replace(parts[-1], attention=attention))


def test_parts_add_up_to_the_whole(problem: PlanInput) -> None:
    predicted = estimate(problem, stages())
    terms = [part.decode_s for part in predicted.stages] + [predicted.hops[0].decode_s, predicted.back.decode_s]
    assert predicted.tpot_s == pytest.approx(sum(terms))
    assert predicted.period_s == max(terms)
    assert [part.head_s > 0 for part in predicted.stages] == [False, True]
    assert [(hop.source, hop.target) for hop in (*predicted.hops, predicted.back)] == [("a-id", "b-id"), ("b-id", "a-id")]
    assert predicted.back.prefill_chunk_s == 0.0


def test_one_stage_has_no_hops(problem: PlanInput) -> None:
    predicted = estimate(problem, stages(cuts=(0, 4)))
    assert predicted.hops == ()
    assert (predicted.back.decode_s, predicted.back.link) == (0.0, "local")
    assert predicted.tpot_s == predicted.stages[0].decode_s


def test_a_longer_prompt_is_pipelined_over_the_stages(problem: PlanInput) -> None:
    one_chunk, three_chunks = (
        estimate(msgspec.structs.replace(problem, context=512, prompt_tokens=tokens), stages()) for tokens in (128, 384)
    )
    in_turn = 3 * sum(part.prefill_chunk_s for part in three_chunks.stages)
    assert one_chunk.ttft_s < three_chunks.ttft_s < in_turn


def test_energy_is_each_peers_time_at_its_power_or_unknown(problem: PlanInput) -> None:
    predicted = estimate(problem, stages())
    first, second = predicted.stages
    hops = 5.0 * predicted.hops[0].decode_s + 20.0 * predicted.back.decode_s
    assert predicted.energy_j == pytest.approx(5.0 * first.decode_s + 20.0 * second.decode_s + hops)
    unmeasured = msgspec.structs.replace(PEERS[1], power_w=None)
    predicted = estimate(msgspec.structs.replace(problem, profiles=(PEERS[0], unmeasured)), stages())
    assert predicted.energy_j is None
    assert predicted.stages[0].energy_j is not None


def test_the_slowest_shard_of_a_layer_counts(problem: PlanInput) -> None:
    sharded = estimate(problem, stages(*SHARDED)).stages[1]
    alone = [estimate(problem, stages(part)).stages[1].attend_s[0] for part in SHARDED]
    assert sharded.attend_s[0] == max(alone)
    assert sharded.attend_s[1] == estimate(problem, stages()).stages[1].attend_s[1]


def test_the_source_of_each_link_is_reported(problem: PlanInput) -> None:
    backwards = Network({("b-id", "a-id"): problem.network.stats["b-id", "a-id"]})
    predicted = estimate(msgspec.structs.replace(problem, network=backwards), stages())
    assert (predicted.hops[0].link, predicted.back.link) == ("measured backwards", "measured")


def test_memory_of_a_shard_is_on_its_peer(problem: PlanInput) -> None:
    use = {row.peer: row.use for row in estimate(problem, stages(*SHARDED)).memory}
    per_head = 100 * 2 * 64 * 4
    assert use[PEERS[2].id].total_bytes == 2 * per_head
    assert use[PEERS[0].id].kv_bytes == 2 * 3 * per_head + 40 * 2 * 64 * 4
    assert sum(row.kv_bytes for row in use.values()) == 4 * 3 * per_head


def test_memory_is_in_the_order_of_the_plan(problem: PlanInput) -> None:
    assert [row.peer for row in peer_memory(problem, stages(*SHARDED))] == ["a-id", "b-id", "c-id"]
    predicted = estimate(problem, stages())
    assert predicted.memory_share == max(row.share for row in predicted.memory)


def test_a_stage_on_an_unknown_peer_is_an_error(problem: PlanInput) -> None:
    with pytest.raises(NoPeer):
        estimate(problem, (StagePlan(peer="z-id", layers=LayerRange(0, 4)),))
