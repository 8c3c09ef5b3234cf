import msgspec
import numpy as np
import pytest

from in_process.clusters import make_card, make_holding, make_peer, make_problem
from meshd.errors import DoesNotFit
from meshd.planner.model.memory import (
    RESERVE,
    RUNTIME_BASE_BYTES,
    allowed_bytes,
    capacity_bytes,
    memory_table,
    memory_tables,
    missing_bytes,
    shard_kv_bytes,
    stage_memory,
)
from meshd.planner.search.solve import solve
from meshd.types import AttentionShard, LayerRange, StagePlan


def stage(start: int, end: int, *attention: AttentionShard) -> StagePlan:
    return StagePlan(peer="a-id", layers=LayerRange(start, end), attention=attention)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_agrees_with_single_stages(tied: bool) -> None:
    card = make_card(6, layer_bytes=[100, 2000, 30, 4000, 50, 600], tied=tied)
    problem = make_problem(make_peer("a"), card=card, context=77)
    table = memory_table(problem, problem.profiles[0])
    for start in range(7):
        for end in range(7):
            if start < end:
                assert table[start, end] == stage_memory(problem, stage(start, end)).total_bytes
            else:
                assert np.isinf(table[start, end])


BITS = {"Q4_0": 4.5, "Q8_0": 8.5, "F32": 32.0}


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_each_peer_is_that_of_its_backend(tied: bool) -> None:
    weights = {"Q4_0": (1600, 3200, 0, 800), "Q8_0": (0, 0, 1600, 320), "F32": (7, 7, 7, 7)}
    card = msgspec.structs.replace(
        make_card(4, tied=tied), layer_weights=weights, head_weights={"Q8_0": 48_000_000}, embedding_bytes=17_000_000
    )
    small, large = make_peer("a", weight_bits=BITS), make_peer("b", weight_bits={**BITS, "Q4_0": 7.0})
    unknown = make_peer("c", weight_bits={"Q8_0": 8.5, "F32": 32.0})
    problem = make_problem(small, large, unknown, card=card, context=77)
    tables = memory_tables(problem, problem.profiles)
    for place, peer in enumerate(problem.profiles):
        for start in range(4):
            for end in range(start + 1, 5):
                whole = stage_memory(problem, StagePlan(peer=peer.id, layers=LayerRange(start, end))).total_bytes
                assert tables[place, start, end] == whole
    assert tables[1, 0, 2] - tables[0, 0, 2] == 4800 * 2.5 / 8
    assert tables[1, 2, 3] == tables[0, 2, 3]
    assert tables[2, 1, 2] - tables[0, 1, 2] == 3200 * (32 - 4.5) / 8


def test_a_peer_whose_backend_needs_less_memory_gets_the_layers_that_fit_only_there() -> None:
    card = msgspec.structs.replace(make_card(10), layer_weights={"Q4_0": (40_000_000,) * 10})
    peers = [make_peer(name, memory=500 << 20, weight_bits={"Q4_0": bits}) for name, bits in (("a", 4.5), ("b", 14.0))]
    problem = make_problem(*peers, card=card, context=64)
    assert [stage.peer for stage in solve(problem).stages] == [peers[0].id]
    with pytest.raises(DoesNotFit):
        solve(make_problem(peers[1], card=card, context=64))


def test_embedding_and_head_are_at_the_ends_only() -> None:
    problem = make_problem(make_peer("a"))
    first, middle, last = (stage_memory(problem, stage(*cut)) for cut in ((0, 10), (10, 20), (20, 30)))
    assert (first.embedding_bytes > 0, first.head_bytes) == (True, 0)
    assert (middle.embedding_bytes, middle.head_bytes) == (0, 0)
    assert (last.embedding_bytes, last.head_bytes > 0) == (0, True)
    assert last.working_bytes - middle.working_bytes == 4 * problem.card.spec.vocab
    assert middle.runtime_bytes == RUNTIME_BASE_BYTES


def test_a_tied_table_counts_once_on_one_peer() -> None:
    tied, untied = (make_problem(make_peer("a"), card=make_card(tied=tied)) for tied in (True, False))
    saved = stage_memory(untied, stage(0, 30)).total_bytes - stage_memory(tied, stage(0, 30)).total_bytes
    assert saved == tied.card.embedding_bytes


def test_kv_grows_with_context_and_layers() -> None:
    problem = make_problem(make_peer("a"), context=1000)
    assert stage_memory(problem, stage(3, 8)).kv_bytes == 1000 * 5 * 2 * 3 * 64 * 4


def test_kv_of_a_shard_is_not_counted_on_its_stage() -> None:
    problem = make_problem(make_peer("a"), make_peer("b"), context=900)
    away = AttentionShard(peer="b-id", layers=LayerRange(0, 2), kv_heads=(0, 1), tokens=(300, 900))
    here = AttentionShard(peer="a-id", layers=LayerRange(0, 2), kv_heads=(1, 3))
    size = 2 * 600 * 2 * 64 * 4
    assert shard_kv_bytes(problem, away) == size
    whole = stage_memory(problem, stage(0, 4)).kv_bytes
    assert stage_memory(problem, stage(0, 4, away, here)).kv_bytes == whole - size


def test_memory_of_the_models_own_holdings_counts_as_capacity() -> None:
    held = make_holding(0, 10, kv_tokens=100)
    size = held.weight_bytes + 100 * 10 * 1536
    peer = make_peer("a", memory=1000, holdings=(held, make_holding(10, 20, state="failed")))
    problem = make_problem(peer)
    assert capacity_bytes(problem, peer) == 1000 + size
    busy = make_peer("b", memory=1000, holdings=(msgspec.structs.replace(held, kv_tokens_free=99),))
    assert capacity_bytes(make_problem(busy), busy) == 1000
    assert capacity_bytes(make_problem(busy, resident_only=True), busy) == 1000 + size
    assert allowed_bytes(problem, peer) == pytest.approx((1 - RESERVE) * capacity_bytes(problem, peer))


def test_missing_bytes_include_the_reserve() -> None:
    assert missing_bytes(900, 1000) == 0
    assert missing_bytes(901, 1000) == 2
    assert missing_bytes(90, 0) == 100


def test_memory_adds_up() -> None:
    problem = make_problem(make_peer("a"))
    use = stage_memory(problem, stage(0, 30))
    assert use.total_bytes == sum(msgspec.structs.astuple(use))
    assert (use + use).total_bytes == 2 * use.total_bytes
