"""Tokenizers as model files describe them: GGUF metadata, or Hugging Face's `tokenizer.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from meshd.errors import ModelFileError
from meshd.models.gguf_header import MetadataValue
from meshd.models.tokenizer import Tokenizer, Vocabulary

MAX_TOKENIZER_JSON_BYTES = 64 << 20
_UNSUPPORTED_HINT = "meshd can't read this model's text yet; try smollm2:135m"
_CONTROL, _USER_DEFINED = 3, 4
"""GGUF's `tokenizer.ggml.token_type`."""
_ONE_DIGIT_EACH = frozenset({"smollm", "starcoder", "refact", "command-r"})
_AS_GPT2 = frozenset({"gpt-2"})
"""GGUF's `tokenizer.ggml.pre`: how text is cut into words before BPE (llama.cpp's `llama-vocab.cpp` has the patterns)."""


def tokenizer_from_gguf(metadata: Mapping[str, MetadataValue]) -> Tokenizer:
    """Rebuild the tokenizer that a GGUF file describes. Raises: ModelFileError."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelFileError(f"tokenizer kind {kind!r} can't be used: only gpt2 (byte-level BPE) is known", hint=_UNSUPPORTED_HINT)
    tokens = _strings(metadata, "tokens")
    types = _types(metadata, len(tokens))
    vocabulary = Vocabulary(
        tokens=tokens,
        control={token: id_ for id_, token in enumerate(tokens) if types[id_] == _CONTROL and token},
        verbatim=frozenset(id_ for id_, type_ in enumerate(types) if type_ in (_CONTROL, _USER_DEFINED)),
    )
    bpe = _bpe(tokens, _strings(metadata, "merges"))
    bpe.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
    added = (tokens[id_] for id_, type_ in enumerate(types) if type_ == _USER_DEFINED)
    bpe.add_tokens([AddedToken(token, normalized=False) for token in added])
    bos, eos = (_special(metadata, key, len(tokens)) for key in ("bos_token_id", "eos_token_id"))
    return Tokenizer(
        bpe,
        vocabulary,
        bos=bos,
        eos=eos,
        prefix=(bos,) if bos is not None and metadata.get("tokenizer.ggml.add_bos_token") is True else (),
        suffix=(eos,) if eos is not None and metadata.get("tokenizer.ggml.add_eos_token") is True else (),
    )


def tokenizer_from_json(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` of a byte-level vocabulary. Which tokens begin and end a text it tells only by its post-processor.

    Raises: ModelFileError.
    """
    try:
        if path.stat().st_size > MAX_TOKENIZER_JSON_BYTES:
            raise ModelFileError(f"{path} can't be used: it is larger than {MAX_TOKENIZER_JSON_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        added: list[dict[str, Any]] = json.loads(text)["added_tokens"]
        bpe = tokenizers.Tokenizer.from_str(text)
        control = {str(token["content"]): int(token["id"]) for token in added if token["special"]}
        verbatim = frozenset(int(token["id"]) for token in added)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror}") from error
    except ModelFileError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelFileError(f"{path} is no usable tokenizer.json: {error}") from error
    if not isinstance(bpe.decoder, tokenizers.decoders.ByteLevel):
        raise ModelFileError(f"{path} can't be used: it is not byte-level", hint=_UNSUPPORTED_HINT)
    return _from_library(bpe, control, verbatim)


def _from_library(bpe: tokenizers.Tokenizer, control: dict[str, int], verbatim: frozenset[int]) -> Tokenizer:
    ids = bpe.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(ids.values(), default=-1) + 1)
    for token, id_ in ids.items():
        tokens[id_] = token
    around = bpe.encode("a", add_special_tokens=True).ids
    plain = bpe.encode("a", add_special_tokens=False).ids
    start = next((at for at in range(len(around)) if around[at : at + len(plain)] == plain), 0)
    bpe.encode_special_tokens = True
    return Tokenizer(
        bpe,
        Vocabulary(tokens=tokens, control=control, verbatim=verbatim),
        prefix=tuple(around[:start]),
        suffix=tuple(around[start + len(plain) :]),
    )


def _bpe(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tokenizers.Tokenizer:
    ids = {token: id_ for id_, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelFileError("the tokenizer can't be used: tokenizer.ggml.tokens has a token twice")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        return tokenizers.Tokenizer(models.BPE(ids, pairs))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelFileError(f"the tokenizer can't be used: tokenizer.ggml.merges: {error}") from error


def _pre_tokenizer(pre: MetadataValue | None) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _AS_GPT2:
        return words
    if pre in _ONE_DIGIT_EACH:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    known = ", ".join(sorted(_ONE_DIGIT_EACH | _AS_GPT2))
    raise ModelFileError(f"pre-tokenizer {pre!r} can't be used: only {known} are known", hint=_UNSUPPORTED_HINT)


def _strings(metadata: Mapping[str, MetadataValue], key: str) -> tuple[str, ...]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
        raise ModelFileError(f"the tokenizer can't be used: metadata key tokenizer.ggml.{key} is no list of strings")
    return value  # type: ignore[return-value]  # a GGUF array is of one type


def _types(metadata: Mapping[str, MetadataValue], count: int) -> tuple[MetadataValue, ...]:
    value = metadata.get("tokenizer.ggml.token_type", (1,) * count)
    if not isinstance(value, tuple) or len(value) != count:
        raise ModelFileError(f"the tokenizer can't be used: tokenizer.ggml.token_type is not {count} numbers")
    return value


def _special(metadata: Mapping[str, MetadataValue], key: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ModelFileError(f"the tokenizer can't be used: tokenizer.ggml.{key} {value!r} is no token of its {count}")
    return value
