import msgspec
import numpy as np
import pytest

from in_process.clusters import make_card, make_holding, make_peer
from meshd.planner.model import cost
from meshd.planner.network import Network
from meshd.types import AttentionShard, LayerRange, LinkStats, ModelSpec

TINY = ModelSpec(
    architecture="llama",
    layers=1,
    hidden=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    ffn=12,
    vocab=16,
    context_length=64,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_head=True,
)


def test_parameters_of_a_block_equal_those_of_smollm2() -> None:
    card = make_card()
    norms = 2 * card.spec.hidden
    assert cost.block_parameters(card.spec) == card.layer_parameters[0] - norms


def test_decode_is_weights_over_rate_plus_overhead() -> None:
    card = make_card(3, layer_bytes=[1000, 2000, 4000])
    peer = make_peer("a", decode_gb_s=1e-6, overhead_s=0.5)
    assert cost.layer_decode_s(peer, card) == pytest.approx([1.5, 2.5, 4.5])


def test_measured_times_override_derived_ones() -> None:
    card = make_card(4)
    holding = make_holding(0, 2, layer_decode_s=0.003, layer_prefill_s=0.0002, head_s=0.004)
    peer = make_peer("a", holdings=(holding,), attention_gb_s=1e9, prefill_gflops=1e9)
    assert cost.layer_decode_s(peer, card) == pytest.approx([0.003] * 4)
    assert cost.layer_prefill_s(peer, card, 100, 0) == pytest.approx([0.02] * 4)
    assert cost.head_s(peer, card) == 0.004


def test_measured_attention_replaces_the_rate() -> None:
    card, measured = make_card(2), make_holding(0, 2, attention_token_s=2e-6, attention_pair_s=3e-9, layer_prefill_s=1e-4)
    peer = make_peer("a", holdings=(measured,))
    assert cost.attention_decode_s(peer, 1500, 1536) == pytest.approx(0.003)
    assert cost.layer_prefill_s(peer, card, 128, 1024) == pytest.approx([0.0128 + 128 * (1024 + 64.5) * 3e-9] * 2)


def test_factors_scale_their_phase_only() -> None:
    card, peer = make_card(2), make_peer("a")
    slow = msgspec.structs.replace(peer, decode_factor=2.0, prefill_factor=1.5)
    assert cost.layer_decode_s(slow, card) == pytest.approx(2 * cost.layer_decode_s(peer, card))
    assert cost.attention_decode_s(slow, 100, 1536) == pytest.approx(2 * cost.attention_decode_s(peer, 100, 1536))
    assert cost.head_s(slow, card) == pytest.approx(2 * cost.head_s(peer, card))
    assert cost.layer_prefill_s(slow, card, 64, 64) == pytest.approx(1.5 * cost.layer_prefill_s(peer, card, 64, 64))


def test_short_prefill_is_bound_by_reading_the_weights() -> None:
    card = make_card(1)
    peer = make_peer("a", prefill_gflops=1e6, overhead_s=0.0)
    read = card.layer_bytes[0] / peer.rates.decode_bytes_s
    assert cost.layer_prefill_s(peer, card, 1, 0)[0] == pytest.approx(read, rel=1e-3)


def test_prefill_of_a_chunk_costs_more_the_later_it_comes() -> None:
    card, peer = make_card(1), make_peer("a")
    times = [float(cost.layer_prefill_s(peer, card, 128, first)[0]) for first in (0, 128, 1024)]
    assert times == sorted(times)
    assert times[0] < times[2]


@pytest.mark.parametrize(
    ("prompt", "expected"), [(1, (1, 1.0)), (50, (50, 1.0)), (128, (128, 1.0)), (192, (128, 1.5)), (1280, (128, 10.0))]
)
def test_chunking(prompt: int, expected: tuple[int, float]) -> None:
    assert cost.chunking(prompt, 128) == expected


def test_pipelined_time_equals_that_of_an_event_by_event_simulation() -> None:
    times, chunks = [3.0, 7.0, 2.0, 5.0], 6
    finished = [0.0] * len(times)
    for _ in range(chunks):
        ready = 0.0
        for place, seconds in enumerate(times):
            ready = max(ready, finished[place]) + seconds
            finished[place] = ready
    assert cost.pipelined_s(times, times, chunks) == finished[-1]


def test_shard_fraction_counts_heads_and_tokens_up_to_the_position() -> None:
    layers = LayerRange(0, 1)
    half_heads = AttentionShard(peer="b", layers=layers, kv_heads=(0, 1))
    late = AttentionShard(peer="b", layers=layers, tokens=(50, 100))
    assert cost.shard_fraction(half_heads, TINY, 10) == 0.5
    assert [cost.shard_fraction(late, TINY, position) for position in (20, 50, 75, 100)] == pytest.approx([0, 0, 1 / 3, 0.5])
    assert cost.shard_fraction(late, TINY, 0) == 0.0


def test_wire_bytes_of_a_shard_follow_laminas_rule() -> None:
    whole = AttentionShard(peer="b", layers=LayerRange(0, 1))
    there, back = cost.shard_wire_bytes(whole, TINY, 2)
    group, width = TINY.heads // TINY.kv_heads, TINY.heads * TINY.head_dim
    assert there + back - 4 * TINY.heads == (2 + 2 / group) * 2 * width


def test_the_time_of_a_shard_has_both_hops_and_its_kv() -> None:
    owner, holder = make_peer("a"), make_peer("b", attention_gb_s=1e-6)
    links = {
        (owner.id, holder.id): LinkStats(rtt_s=2.0, bandwidth_bytes_s=1e12),
        (holder.id, owner.id): LinkStats(rtt_s=8.0, bandwidth_bytes_s=1e12),
    }
    shard = AttentionShard(peer=holder.id, layers=LayerRange(0, 1), kv_heads=(0, 1))
    seconds = cost.shard_decode_s(shard, owner, holder, Network(links), TINY, 10, 100, 4)
    assert seconds == pytest.approx(1.0 + 4.0 + 0.5 * 10 * 100 / 1000)


def test_each_layer_has_one_time() -> None:
    card, peer = make_card(5), make_peer("a")
    assert cost.layer_decode_s(peer, card).shape == cost.layer_prefill_s(peer, card, 9, 0).shape == (5,)
    assert cost.layer_decode_s(peer, card).dtype == np.float64
