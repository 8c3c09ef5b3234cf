import msgspec
import pytest

from in_process.clusters import make_card, make_peer, make_problem
from meshd.errors import NoPeer
from meshd.types import Holding, LayerRange


@pytest.mark.parametrize(("prompt", "context", "position"), [(128, 512, 320), (512, 512, 512), (2000, 512, 512), (1, 2, 1)])
def test_the_mean_position_is_half_way_through_the_answer(prompt: int, context: int, position: int) -> None:
    assert make_problem(make_peer("a"), prompt_tokens=prompt, context=context).position == position


def test_bytes_depend_on_the_element_sizes_of_kv_and_wire() -> None:
    spec = make_card().spec
    problem = make_problem(make_peer("a"), kv_element_bytes=2, wire_element_bytes=1)
    assert problem.kv_token_layer_bytes == 2 * spec.kv_heads * spec.head_dim * 2
    assert problem.activation_bytes == spec.hidden


def test_an_unknown_peer_is_an_error_with_a_hint() -> None:
    a, b = make_peer("a"), make_peer("b")
    problem = make_problem(a, b)
    assert problem.profile(b.id) is b
    with pytest.raises(NoPeer, match="peer z-id is not in the cluster now") as caught:
        problem.profile("z-id")
    assert caught.value.hint == "see `meshd status`"


def test_holdings_of_layers_that_the_model_does_not_have_are_left_out() -> None:
    peer = make_peer("a")
    holdings = [
        Holding(model=make_card(4).id, layers=LayerRange(*layers), state="active") for layers in ((0, 4), (3, 5), (0, 1024))
    ]
    problem = make_problem(msgspec.structs.replace(peer, holdings=tuple(holdings)), card=make_card(4))
    assert [str(holding.layers) for holding in problem.profiles[0].holdings] == ["0-4"]
