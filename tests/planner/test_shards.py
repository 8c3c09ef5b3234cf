import pytest

from in_process.clusters import make_card
from meshd.errors import InvalidRequest
from meshd.planner.shards import check_shards, check_tiling
from meshd.types import AttentionShard, LayerRange, PeerId, StagePlan

SPEC = make_card(4).spec
Span = tuple[int, int]


def shard(layers: Span, heads: Span | None = None, tokens: Span | None = None) -> AttentionShard:
    return AttentionShard(peer=PeerId("b"), layers=LayerRange(*layers), kv_heads=heads, tokens=tokens)


def check(*attention: AttentionShard) -> None:
    check_shards(StagePlan(peer=PeerId("a"), layers=LayerRange(2, 4), attention=attention), SPEC, 100)


@pytest.mark.parametrize(
    "attention",
    [
        (),
        (shard((2, 4)),),
        (shard((3, 4)),),
        (shard((2, 3), (0, 2)), shard((2, 3), (2, 3), (0, 60)), shard((2, 3), (2, 3), (60, 100))),
    ],
)
def test_shards_that_cover_their_layers_once_are_accepted(attention: tuple[AttentionShard, ...]) -> None:
    check(*attention)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ((shard((2, 3), (0, 2)),), "KV head 2 from token 0 on is covered by no part"),
        ((shard((2, 3), None, (0, 99)),), "KV head 0 from token 99 on is covered by no part"),
        ((shard((2, 4)), shard((3, 4), (1, 2))), "layer 3's attention: KV head 1 from token 0 on is covered 2 times"),
        ((shard((1, 3)),), "not in the stage's layers 2-4"),
        ((shard((2, 3), (0, 4)),), "outside its 3 KV heads"),
        ((shard((2, 3), None, (0, 101)),), "100 tokens"),
        ((shard((2, 3), (1, 1)),), "outside"),
    ],
)
def test_shards_must_cover_their_layer_exactly(attention: tuple[AttentionShard, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        check(*attention)
    assert caught.value.param == "attention"


def test_the_order_of_the_parts_does_not_matter() -> None:
    parts = [((0, 1), None), ((1, 2), (0, 8)), ((1, 2), (8, 9))]
    for ordered in (parts, parts[::-1], parts[1:] + parts[:1]):
        check_tiling(ordered, kv_heads=2, context=9, layer=0)
    with pytest.raises(InvalidRequest, match="covered by no part"):
        check_tiling([], kv_heads=2, context=9, layer=0)
