"""Tokenizers from `tokenizer.json`: the shapes that language models use, and hostile documents."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models as library_models
from transformers import PreTrainedTokenizerFast

from meshd.errors import InvalidRequest, ModelFileError
from meshd.models.cards import end_of_sequence
from meshd.models.text.template import template_from_gguf
from meshd.models.text.tokenizer.document import HUGGINGFACE_KEY, MAX_ID
from meshd.models.text.tokenizer.files import tokenizer_from_gguf, tokenizer_from_json
from meshd.models.text.tokenizer.sentencepiece import merges_of
from meshd.models.text.tokenizer.tokenizer import Tokenizer
from texts.odd_strings import odd_strings
from tiny import vocabularies as tiny_vocabularies

STRINGS = odd_strings(700, seed=9)
TO_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
MARKED = normalizers.Replace(" ", "▁")


@pytest.fixture(scope="module")
def pieces() -> library_models.BPE:
    metadata, _ = tiny_vocabularies.spm(spaced=True)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    scored = {token: scores[id_] for id_, token in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][id_] == 1}
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    return library_models.BPE(vocabulary, merges_of(tokens, scored), unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def with_special(made: LibraryTokenizer) -> LibraryTokenizer:
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>", "<|im_end|>")])
    made.add_special_tokens([AddedToken("<|im_start|>", normalized=False, special=True, rstrip=True)])
    made.add_special_tokens([AddedToken("<mask>", normalized=False, special=True, lstrip=True)])
    made.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("\n\n", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def llama2(pieces: library_models.BPE) -> LibraryTokenizer:
    made = LibraryTokenizer(pieces)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), MARKED])
    made.decoder = decoders.Sequence([*TO_SPACES, decoders.Strip(" ", 1, 0)])
    return with_special(made)


def llama2_not_legacy(pieces: library_models.BPE) -> LibraryTokenizer:
    made = LibraryTokenizer(pieces)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([*TO_SPACES, decoders.Strip(" ", 1, 0)])
    return with_special(made)


def gemma(pieces: library_models.BPE) -> LibraryTokenizer:
    made = LibraryTokenizer(pieces)
    made.normalizer = MARKED
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(TO_SPACES)
    return with_special(made)


def byte_level(_: library_models.BPE) -> LibraryTokenizer:
    metadata = tiny_vocabularies.byte_level("gpt-2")
    vocabulary = {token: id_ for id_, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = LibraryTokenizer(library_models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    made = with_special(made)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return made


SHAPES: dict[str, Callable[[library_models.BPE], LibraryTokenizer]] = {
    "llama2": llama2,
    "llama2 not legacy": llama2_not_legacy,
    "gemma": gemma,
    "byte-level": byte_level,
}


def read(text: str, **more: Any) -> Tokenizer:
    return tokenizer_from_gguf({HUGGINGFACE_KEY: text} | {f"tokenizer.ggml.{key}": value for key, value in more.items()})


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_ids_and_text_as_transformers(pieces: library_models.BPE, shape: str) -> None:
    text = SHAPES[shape](pieces).to_str()
    tokenizer, reference = read(text), PreTrainedTokenizerFast(tokenizer_object=LibraryTokenizer.from_str(text))
    for string in [*STRINGS, " a <|im_start|> \n b <mask> c<|im_end|> d<s><s>e\u00a0<mask><|im_start|>\u2003<tool_call> f"]:
        ids = list(reference(string)["input_ids"])
        if len(ids) > 1 and ids[:1] == ids[1:2] == tokenizer.encode("", add_special=True)[:1]:
            del ids[0]  # a text that spells BOS itself gets no second one here
        assert tokenizer.encode(string, add_special=True, parse_special=True) == ids, ascii(string)
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip_special=skip) == expected
            stream = tokenizer.stream(skip_special=skip)
            assert "".join(map(stream.push, ids)) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_text_never_becomes_a_control_token(pieces: library_models.BPE, shape: str) -> None:
    tokenizer = read(SHAPES[shape](pieces).to_str())
    for string in STRINGS:
        ids = tokenizer.encode(string, add_special=False)
        assert not any(map(tokenizer.is_control, ids))
    ids = tokenizer.encode("a </s> b<|im_start|>", add_special=False)
    assert tokenizer.decode(ids).strip() == "a </s> b<|im_start|>"


def test_an_answer_that_continues_a_text_keeps_its_leading_space(pieces: library_models.BPE) -> None:
    tokenizer = read(llama2(pieces).to_str())
    *before, last = tokenizer.encode("The quick", add_special=True)
    ids = tokenizer.encode("brown", add_special=False)
    for after, shown in ((None, "brown"), (before[0], "brown"), (last, " brown")):
        stream = tokenizer.stream(after=after)
        assert "".join(map(stream.push, ids)) == shown


def test_the_files_metadata_overrides_the_tokenizer_json(pieces: library_models.BPE) -> None:
    text = gemma(pieces).to_str()
    assert read(text).encode("the", add_special=True)[0] == 1
    assert (read(text, bos_token_id=1, eos_token_id=2).bos, read(text, bos_token_id=1, eos_token_id=2).eos) == (1, 2)
    plain = read(text).encode("the", add_special=False)
    assert read(text, bos_token_id=1, add_bos_token=False).encode("the", add_special=True) == plain
    assert read(text, bos_token_id=1, eos_token_id=2, add_eos_token=True).encode("the", add_special=True) == [1, *plain, 2]
    assert read(text, bos_token_id=4, add_bos_token=True).encode("the", add_special=True) == [4, *plain]


def test_end_tokens_and_template_tokens_are_found_in_a_tokenizer_json_alone(pieces: library_models.BPE) -> None:
    text = gemma(pieces).to_str()
    end = LibraryTokenizer.from_str(text).token_to_id("<|im_end|>")
    metadata = {HUGGINGFACE_KEY: text, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    assert end_of_sequence(metadata) == tuple(sorted({2, end}))
    assert end_of_sequence(metadata | {"meshd.eos_token_ids": (2, 7)}) == tuple(sorted({2, 7, end}))
    template = template_from_gguf(metadata | {"tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}"})
    assert template.render([]) == "<s></s>"


def test_truncation_padding_and_dropout_are_ignored(pieces: library_models.BPE) -> None:
    made = gemma(pieces)
    expected = made.encode("the quick brown fox", add_special_tokens=False).ids
    made.enable_truncation(2)
    made.enable_padding(length=40)
    document = json.loads(made.to_str())
    document["model"]["dropout"] = 0.9
    assert read(json.dumps(document)).encode("the quick brown fox", add_special=False) == expected


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TINY: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ],
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+|b"}, "behavior": "Isolated", "invert": False},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
    },
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<s>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "▁": 4},
        "merges": [["a", "b"]],
    },
}


def changed(path: str, value: Any) -> str:
    document = copy.deepcopy(TINY)
    *parents, last = path.split(".")
    inner: Any = document
    for name in parents:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = value
    return json.dumps(document)


UNUSABLE: dict[str, tuple[str, Any, str]] = {
    "wordpiece": ("model", {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}, "'WordPiece', and only BPE"),
    "unigram": ("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}, "'Unigram', and only BPE"),
    "no model": ("model", None, "no usable"),
    "another decoder": ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder 'WordPiece'"),
    "no decoder": ("decoder", None, "neither byte-level nor SentencePiece"),
    "a decoder that replaces": ("decoder.decoders.0.content", "x", "replaces"),
    "parts of words": ("model.end_of_word_suffix", "</w>", "prefix or suffix"),
    "a merge of nothing": ("model.merges", [["x", "y"]], "no usable"),
    "an id too large": ("model.vocab.a", MAX_ID, "over"),
    "an id that is none": ("model.vocab.a", -1, "no usable"),
    "an added id too large": ("added_tokens.0.id", 1 << 40, "no usable"),
    "an added id that is another's": ("added_tokens.0.id", 2, "'<s>' is not token 2"),
    "an added token without text": ("added_tokens.0.content", None, "no usable"),
    "added tokens that are none": ("added_tokens", [1], "no usable"),
    "a pattern that is none": ("pre_tokenizer.pattern", {"Regex": "(("}, "no usable"),
    "a character map of nothing": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "no usable"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_document_is_refused_by_name(name: str) -> None:
    path, value, named = UNUSABLE[name]
    with pytest.raises(ModelFileError, match=named):
        read(changed(path, value))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 200_000, '{"added_tokens": [], "model": {"type": "BPE"}}', 5])
def test_an_invalid_tokenizer_json_is_refused(text: Any) -> None:
    with pytest.raises(ModelFileError, match="json"):
        read(text)


def test_ids_outside_the_vocabulary_are_not_used_and_named() -> None:
    good, odd = read(json.dumps(TINY), bos_token_id=0), read(json.dumps(TINY), bos_token_id=0, eos_token_id=5, add_eos_token=True)
    assert good.encode("ab", add_special=True) == odd.encode("ab", add_special=True) == [0, 1, 2]
    assert (good.warnings, odd.eos) == ((), None)
    assert "token 5 as EOS" in odd.warnings[0]


def test_a_control_token_that_is_too_long_is_refused() -> None:
    document = copy.deepcopy(TINY)
    document["added_tokens"].append({"id": 5, "content": "<" * 257, "special": True} | dict.fromkeys(FLAGS, False))
    with pytest.raises(ModelFileError, match="257 characters"):
        read(json.dumps(document))


def test_thousands_of_control_tokens_are_found_soon() -> None:
    document = copy.deepcopy(TINY)
    for id_ in range(5, 6000):
        document["added_tokens"].append({"id": id_, "content": f"<unused{id_}>", "special": True} | dict.fromkeys(FLAGS, False))
    tokenizer = read(json.dumps(document))
    started = time.process_time()
    ids = tokenizer.encode("<unused7>" + "<" * 50_000 + "<unused5999>", add_special=False, parse_special=True)
    assert (ids[0], ids[-1]) == (7, 5999)
    assert time.process_time() - started < 5


def test_a_pattern_with_endless_backtracking_is_stopped() -> None:
    tokenizer = read(changed("pre_tokenizer.pattern", {"Regex": "(a|aa|aaa)+$"}))
    with pytest.raises(InvalidRequest, match="patterns fail"):
        tokenizer.encode("a" * 200 + "b", add_special=False)


def test_mutated_documents_are_refused_or_usable() -> None:
    rng = random.Random(5)
    plain: list[Any] = [None, True, -1, 0, 1 << 33, 1.5, "", "a", "▁"]
    values = [*plain, [], {}, [[]], {"type": "ByteLevel"}, {"type": "x"}, {"String": ""}, {"Regex": ""}]
    used = 0
    for _ in range(1500):
        document = copy.deepcopy(TINY)
        for _ in range(rng.randint(1, 2)):
            inner: Any = document
            while True:
                key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
                if not inner[key] or not isinstance(inner[key], dict | list) or rng.random() < 0.3:
                    break
                inner = inner[key]
            if rng.random() < 0.2:
                del inner[key]
            else:
                inner[key] = copy.deepcopy(rng.choice(values))
            if not document:
                break
        try:
            tokenizer = read(json.dumps(document))
            tokenizer.decode(tokenizer.encode("ab ba<s> ü", add_special=True, parse_special=True))
            used += 1
        except (ModelFileError, InvalidRequest):
            pass
    assert 100 < used < 1400


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff{}")
    with pytest.raises(ModelFileError, match="not UTF-8"):
        tokenizer_from_json(path)
