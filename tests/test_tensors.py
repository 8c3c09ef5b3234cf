"""Shapes of a model's tensors, and agreement between the tables of kinds of weights."""

import msgspec
import pytest

from in_process.clusters import make_card
from meshd.kernels.weights import load
from meshd.models.files import gguf_header
from meshd.tensors import KINDS, border_shapes, layer_shapes, rope_shape, tensor_shape

SPEC = make_card(2).spec
change = msgspec.structs.replace


def test_shapes_of_projections_are_out_by_in() -> None:
    shapes = layer_shapes(SPEC)
    assert shapes["attn_k.weight"] == (3 * 64, 576)
    assert shapes["ffn_down.weight"] == (576, 1536)


def test_fused_tensors_replace_their_parts() -> None:
    shapes = layer_shapes(change(SPEC, fused=("attn_qkv", "ffn_up")))
    assert shapes["attn_qkv.weight"] == ((9 + 2 * 3) * 64, 576)
    assert shapes["ffn_up.weight"] == (2 * 1536, 576)
    assert not {"attn_q.weight", "ffn_gate.weight"} & set(shapes)


def test_experts_have_an_axis_in_front_and_a_router() -> None:
    shapes = layer_shapes(change(SPEC, experts=4, experts_used=2, biases=("ffn_gate_exps",)))
    assert shapes["ffn_gate_inp.weight"] == (4, 576)
    assert shapes["ffn_down_exps.weight"] == (4, 576, 1536)
    assert shapes["ffn_gate_exps.bias"] == (4, 1536)


@pytest.mark.parametrize(("norm", "widths"), [("head", (64, 64)), ("all", (576, 192))])
def test_norms_of_q_and_k_are_per_head_or_over_all_heads(norm: str, widths: tuple[int, int]) -> None:
    shapes = layer_shapes(change(SPEC, qk_norm=norm))
    assert (shapes["attn_q_norm.weight"], shapes["attn_k_norm.weight"]) == tuple((width,) for width in widths)


def test_a_tied_head_has_no_tensor_and_rotations_may_be_partial() -> None:
    assert "output.weight" not in border_shapes(SPEC)
    assert border_shapes(change(SPEC, tied_head=False))["output.weight"] == (49152, 576)
    assert (rope_shape(SPEC), rope_shape(change(SPEC, rope_dim=16))) == ((32,), (8,))


def test_the_shape_of_any_tensor_is_found_by_its_name() -> None:
    assert tensor_shape(SPEC, "blk.1.attn_norm.weight") == (576,)
    assert tensor_shape(SPEC, "rope_freqs.weight") == (32,)
    for name in ("blk.1.nothing.weight", "nothing", "blk.1"):
        with pytest.raises(KeyError):
            tensor_shape(SPEC, name)


def test_models_are_accepted_in_every_kind_that_can_be_read() -> None:
    assert set(KINDS) == set(load.KINDS)


def test_every_kind_that_can_be_read_has_a_number_in_gguf() -> None:
    assert set(load.KINDS) <= {name for name, _, _ in gguf_header.KINDS.values()}
