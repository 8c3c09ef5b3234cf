"""Small vocabularies, trained on demand, in the form of GGUF metadata."""

import io
import json
from collections.abc import Mapping
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, trainers

from texts.odd_strings import odd_strings

PLAIN = (
    "The quick brown fox doesn't jump over 1234567 lazy dogs; it's 10:30, and THEY'RE sleeping.\n"
    "    return x\r\n\r\n\t\tif (a == b) {\n"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<table>", "<tool_call>", "</think>")
WHOLE = frozenset({"the", "Hello", "ĠHello", "aBCd"})
"""Tokens that no sequence of merges makes."""


def byte_level(pre: str) -> dict[str, Any]:
    """Train byte-level BPE with merges across words, so that only the rule `pre` separates words."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, max_token_length=12, show_progress=False)
    texts = [text for text in odd_strings(3000, seed=7) if not any(token in text for token in CONTROL + ADDED)]
    trained.train_from_iterator([*texts, *[PLAIN] * 200], trainer)
    state: dict[str, Any] = json.loads(trained.to_str())["model"]
    tokens = sorted(WHOLE | state["vocab"].keys())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": (*tokens, *CONTROL, *ADDED),
        "tokenizer.ggml.token_type": (1,) * len(tokens) + (3,) * len(CONTROL) + (4,) * len(ADDED),
        "tokenizer.ggml.merges": tuple(" ".join(pair) for pair in state["merges"] if "".join(pair) not in WHOLE),
        "tokenizer.ggml.eos_token_id": len(tokens),
    }


def spm(*, spaced: bool, added: tuple[str, ...] = ()) -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor]:
    """Train SentencePiece BPE with byte fallback. `spaced`: it puts a space before a text.

    Returns: the GGUF metadata, and the sentencepiece library's processor of the same model.
    """
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\0", "") for text in odd_strings(3000, seed=7)] + [PLAIN] * 50),
        model_writer=written,
        model_type="bpe",
        vocab_size=2500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=spaced,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(added),
        control_symbols=list(CONTROL),
        minloglevel=2,
        num_threads=1,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [model.IdToPiece(id_) for id_ in range(model.vocab_size())]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tuple(pieces),
        "tokenizer.ggml.scores": tuple(model.GetScore(id_) for id_ in range(len(pieces))),
        "tokenizer.ggml.token_type": tuple(4 if piece in added else _type(model, id_) for id_, piece in enumerate(pieces)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": spaced,
    }
    return metadata, model


def model_of(metadata: Mapping[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """Build the sentencepiece library's processor from GGUF metadata. The vocabulary must not put a space before a text."""
    proto = sentencepiece_model_pb2.ModelProto()
    unknown = metadata["tokenizer.ggml.unknown_token_id"]
    rows = zip(*(metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores")), strict=True)
    for id_, (token, type_, score) in enumerate(rows):
        added = type_ == 4
        piece = token.replace(" ", "▁") if added else token
        proto.pieces.add(piece=piece, score=0.0 if added else score, type=2 if id_ == unknown else type_)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    for role in ("bos", "eos", "unk", "pad"):
        name = {"unk": "unknown", "pad": "padding"}.get(role, role)
        setattr(proto.trainer_spec, f"{role}_id", metadata[f"tokenizer.ggml.{name}_token_id"])
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def _type(model: sentencepiece.SentencePieceProcessor, id_: int) -> int:
    if model.IsUnknown(id_):
        return 2
    return 3 if model.IsControl(id_) else 6 if model.IsByte(id_) else 1
