"""Reading a model's structure from its metadata: defaults of each architecture, RoPE, windows, experts and invalid metadata."""

import math
from collections.abc import Mapping

import pytest

from meshd.errors import ModelFileError
from meshd.models.architectures import ARCHITECTURES, spec_from_metadata
from meshd.models.files.gguf_header import MetadataValue, TensorInfo
from meshd.types import ModelSpec, RopeScaling

LAYERS, HIDDEN, HEADS, VOCAB = 4, 64, 8, 100
BASE: dict[str, MetadataValue] = {
    "block_count": LAYERS,
    "context_length": 4096,
    "embedding_length": HIDDEN,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
EXPERTS: dict[str, MetadataValue] = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 48}
YARN: dict[str, MetadataValue] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 1024,
}


def read(
    architecture: str = "llama",
    changes: Mapping[str, MetadataValue | None] | None = None,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
) -> ModelSpec:
    """Read `BASE` with changes to its keys (None removes one) and more tensors."""
    experts = EXPERTS if architecture == "gpt-oss" else {}
    keys = {key: value for key, value in (BASE | experts | dict(changes or {})).items() if value is not None}
    metadata: dict[str, MetadataValue] = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    shapes = {"token_embd.weight": (VOCAB, HIDDEN)}
    shapes |= {f"blk.{layer}.attn_norm.weight": (HIDDEN,) for layer in range(LAYERS)} | dict(tensors or {})
    return spec_from_metadata("x.gguf", metadata, {name: TensorInfo("F32", shape, 0, 0) for name, shape in shapes.items()})


def test_a_plain_llama_has_only_defaults() -> None:
    assert read() == ModelSpec(
        architecture="llama",
        layers=LAYERS,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=2,
        head_dim=HIDDEN // HEADS,
        ffn=96,
        vocab=VOCAB,
        context_length=4096,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=True,
    )


def test_the_head_is_tied_only_if_the_file_has_no_tensor_for_it() -> None:
    assert not read(tensors={"output.weight": (VOCAB, HIDDEN)}).tied_head


def test_missing_kv_heads_are_as_many_as_the_heads() -> None:
    assert read(changes={"attention.head_count_kv": None}).kv_heads == HEADS


def test_the_head_size_may_differ_from_hidden_by_heads() -> None:
    assert read(changes={"attention.key_length": 16, "attention.value_length": 16}).head_dim == 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_has_its_own_values(architecture: str) -> None:
    spec = read(architecture)
    for name, value in ARCHITECTURES[architecture].spec.items():
        if name != "rope_theta_windowed":  # set only in models with a window
            assert getattr(spec, name) == value
    assert spec.embedding_scale == (math.sqrt(HIDDEN) if architecture.startswith("gemma") else 1.0)


@pytest.mark.parametrize(
    ("architecture", "layers", "scale"),
    [("gemma2", 46, (HIDDEN // HEADS) ** -0.5), ("gemma2", 62, 0.0), ("gemma3", 62, (HIDDEN // HEADS) ** -0.5), ("llama", 46, 0.0)],
)
def test_the_largest_gemma_scales_scores_by_hidden_by_heads(architecture: str, layers: int, scale: float) -> None:
    norms = {f"blk.{layer}.attn_norm.weight": (HIDDEN,) for layer in range(layers)}
    changes: dict[str, MetadataValue | None] = {"block_count": layers, "attention.key_length": 16}
    assert read(architecture, changes, norms).attention_scale == pytest.approx(scale)
    assert read(architecture, changes | {"attention.scale": 0.5}, norms).attention_scale == 0.5


def test_a_logit_scale_divides() -> None:
    assert read("granite", {"logit_scale": 8.0}).logit_scale == 0.125


def test_scales_and_soft_caps_are_read() -> None:
    changes: dict[str, MetadataValue | None] = {"embedding_scale": 12.0, "residual_scale": 0.25, "final_logit_softcapping": 30.0}
    spec = read("gemma2", changes | {"attn_logit_softcapping": 50.0})
    assert (spec.embedding_scale, spec.residual_scale) == (12.0, 0.25)
    assert (spec.logit_soft_cap, spec.attention_soft_cap) == (30.0, 50.0)


@pytest.mark.parametrize(
    ("architecture", "pattern", "windowed"),
    [
        ("gemma2", None, (True, False, True, False)),
        ("gemma3", None, (True, True, True, True)),  # the sixth layer would be the first without a window
        ("gemma3", 2, (True, False, True, False)),
        ("llama", None, ()),
        ("llama", 0, ()),
        ("llama", 1, (False, False, False, False)),
        ("llama", (True, False, False, True), (True, False, False, True)),
        ("llama", (1, 0, 0, 1), (True, False, False, True)),
    ],
)
def test_a_window_pattern_comes_from_the_metadata_or_the_architecture(
    architecture: str, pattern: MetadataValue | None, windowed: tuple[bool, ...]
) -> None:
    spec = read(architecture, {"attention.sliding_window": 32, "attention.sliding_window_pattern": pattern})
    assert (spec.window, spec.windowed) == (32, windowed)


def test_without_a_window_no_layer_has_other_rotations() -> None:
    assert read("gemma3").rope_theta_windowed == 0.0
    assert read("gemma3", {"attention.sliding_window": 32}).rope_theta_windowed == 10000.0


def test_layers_with_a_window_have_the_base_in_the_metadata() -> None:
    changes: dict[str, MetadataValue | None] = {"attention.sliding_window": 32, "rope.freq_base": 1e6}
    assert read("gemma3", changes | {"rope.freq_base_swa": 5000.0}).rope_theta_windowed == 5000.0
    assert read("olmo2", changes).rope_theta_windowed == 1e6  # the base of the other layers, without their scaling
    assert read("llama", changes).rope_theta_windowed == 0.0


def test_some_of_a_heads_dimensions_may_be_rotated() -> None:
    assert read(changes={"rope.dimension_count": 4}).rope_dim == 4
    assert read(changes={"rope.dimension_count": HIDDEN // HEADS}).rope_dim == 0


def test_linear_scaling_needs_only_a_factor() -> None:
    spec = read(changes={"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert spec.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert spec.rope_magnitude == 1.0


def test_yarn_lengthens_the_vectors_and_has_bounds_by_architecture() -> None:
    spec = read(changes=YARN | {"rope.scaling.attn_factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0})
    assert spec.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_context=1024, beta_fast=16.0)
    assert spec.rope_magnitude == pytest.approx(2 * (0.1 * math.log(4) + 1))
    other = read("gpt-oss", YARN)
    assert other.rope_scaling is not None
    assert not other.rope_scaling.whole_bounds


@pytest.mark.parametrize("kind", ["none", "longrope"])
def test_kinds_without_a_factor_do_not_scale(kind: str) -> None:
    assert read(changes=YARN | {"rope.scaling.type": kind}).rope_scaling is None


def test_a_factor_of_one_does_not_scale() -> None:
    assert read(changes=YARN | {"rope.scaling.factor": 1.0}).rope_scaling is None


def test_short_rope_factors_limit_the_context() -> None:
    tensors = {"rope_factors_short.weight": (4,)}
    longrope: dict[str, MetadataValue | None] = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 2048}
    assert read("phi3", longrope, tensors).context_length == 2048
    assert read("phi3", longrope).context_length == 4096
    assert read("phi3", longrope | {"context_length": 1000}, tensors).context_length == 1000
    with pytest.raises(ModelFileError, match="original_context_length"):
        read("phi3", {"rope.scaling.type": "longrope"}, tensors)


def test_biases_come_from_the_architecture_and_from_the_file() -> None:
    assert read("qwen2").biases == ("attn_q", "attn_k", "attn_v")
    more = read("qwen2", tensors={"blk.0.attn_output.bias": (HIDDEN,), "blk.0.attn_q.bias": (HIDDEN,)})
    assert more.biases == ("attn_q", "attn_k", "attn_v", "attn_output")
    with pytest.raises(ModelFileError, match="llama has no projection attn_qkv, but the file has its bias"):
        read(tensors={"blk.0.attn_qkv.bias": (HIDDEN,)})


def test_experts_have_their_own_width() -> None:
    spec = read(changes=EXPERTS)
    assert (spec.experts, spec.experts_used, spec.ffn) == (8, 2, 48)
    assert read(changes=EXPERTS | {"expert_feed_forward_length": None}).ffn == 96
    assert read().experts_used == 0


INVALID: dict[str, tuple[dict[str, MetadataValue | None], str]] = {
    "no layers": ({"block_count": 0}, r"block_count'.*0 is not a positive integer"),
    "a boolean as a count": ({"block_count": True}, r"block_count'.*True is not a positive integer"),
    "more layers than tensors": ({"block_count": (1 << 32) - 1}, "only 5 tensors for 4294967295 layers"),
    "no hidden size": ({"embedding_length": None}, r"embedding_length'.*missing"),
    "no heads": ({"attention.head_count": 0}, "attention.head_count'"),
    "layers that differ": ({"attention.head_count_kv": (2, 1)}, "head_count_kv.: the layers differ"),
    "uneven heads": ({"attention.head_count_kv": 3}, "8 heads can't be divided evenly among 3"),
    "other values": ({"attention.value_length": 16}, r"value_length'.*16 is not 8"),
    "no epsilon": ({"attention.layer_norm_rms_epsilon": None}, r"epsilon'.*missing"),
    "an epsilon that is no number": ({"attention.layer_norm_rms_epsilon": math.nan}, "epsilon'"),
    "an infinite scale": ({"residual_scale": math.inf}, "residual_scale'"),
    "a rope base of 0": ({"rope.freq_base": 0.0}, "rope.freq_base'"),
    "an unknown rope scaling": ({"rope.scaling.type": "ntk"}, "'ntk' is not among none, linear, yarn, longrope"),
    "a rope scaling that is no text": ({"rope.scaling.type": 1}, "1 is not a text"),
    "more rope than head": ({"rope.dimension_count": 32}, "32 is not an even number of at most 8"),
    "odd rope": ({"rope.dimension_count": 3}, "3 is not an even number of at most 8"),
    "yarn without a context": (YARN | {"rope.scaling.original_context_length": None}, r"original_context_length'.*missing"),
    "a pattern of other layers": (
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": (True,) * 3},
        "3 values for 4",
    ),
    "a negative pattern": ({"attention.sliding_window": 8, "attention.sliding_window_pattern": -1}, "-1 is not a number of layers"),
    "a boolean pattern": ({"attention.sliding_window": 8, "attention.sliding_window_pattern": True}, "True is not a number"),
    "more experts used than there are": (EXPERTS | {"expert_used_count": 9}, "9 is more than the model's 8 experts"),
    "experts of which none is used": (EXPERTS | {"expert_used_count": None}, r"expert_used_count'.*missing"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_metadata_is_an_error_that_names_file_and_key(case: str) -> None:
    changes, message = INVALID[case]
    with pytest.raises(ModelFileError, match=message) as caught:
        read(changes=changes)
    assert caught.value.message.startswith("x.gguf can't be run: ")
    assert "layers" in caught.value.message or "metadata key 'llama." in caught.value.message


@pytest.mark.parametrize("architecture", ["mamba", None, 3])
def test_an_unsupported_architecture_is_refused_with_a_list_of_the_supported_ones(architecture: MetadataValue | None) -> None:
    metadata = {} if architecture is None else {"general.architecture": architecture}
    with pytest.raises(ModelFileError, match=f"{architecture!r} is not among llama, .*gpt-oss") as caught:
        spec_from_metadata("x.gguf", metadata, {})
    assert "README" in caught.value.hint


@pytest.mark.parametrize("shape", [None, (VOCAB,), (2, VOCAB, HIDDEN)])
def test_a_model_needs_an_embedding_table(shape: tuple[int, ...] | None) -> None:
    tensors = {} if shape is None else {"token_embd.weight": TensorInfo("F32", shape, 0, 0)}
    with pytest.raises(ModelFileError, match=r"no embedding table token_embd\.weight"):
        spec_from_metadata("x.gguf", {"general.architecture": "llama"}, tensors)
