"""Tokenizers as model files describe them: GGUF metadata, or Hugging Face's `tokenizer.json`."""

from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.text.tokenizer.document import MAX_BYTES, TokenizerDocument, huggingface_json
from meshd.models.text.tokenizer.gguf_keys import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, TokenizerKeys, ids_of, wrong
from meshd.models.text.tokenizer.huggingface import AffixTokens, tokenizer_of
from meshd.models.text.tokenizer.pretokenizers import pretokenizer_named
from meshd.models.text.tokenizer.sentencepiece import merges_of, spm_from_gguf
from meshd.models.text.tokenizer.tokenizer import Tokenizer, Vocabulary, library_errors


def tokenizer_from_gguf(metadata: Mapping[str, MetadataValue]) -> Tokenizer:
    """Rebuild the tokenizer that a GGUF file describes. Raises: ModelFileError."""
    if (document := huggingface_json(metadata)) is not None:
        return tokenizer_of(document, _affixes(metadata))
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            return _byte_level(metadata)
        case "llama":
            return spm_from_gguf(metadata)
        case kind:
            raise ModelFileError(
                f"tokenizer kind {kind!r} can't be used: only gpt2 (byte-level BPE) and llama (SentencePiece BPE) are known",
                hint="meshd does not support this tokenizer yet; try smollm2:135m",
            )


def tokenizer_from_json(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`. Its post-processor defines the tokens around a text. Raises: ModelFileError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelFileError(f"{path} can't be used: it is larger than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is no usable tokenizer.json: it is not UTF-8 ({error.reason})") from error
    return tokenizer_of(TokenizerDocument(text, str(path)))


def _affixes(metadata: Mapping[str, MetadataValue]) -> AffixTokens:
    keys = TokenizerKeys(metadata)
    ids = [value if isinstance(value := keys.get(key), int) else None for key in ("bos_token_id", "eos_token_id")]
    adds = [None if keys.get(key) is None else keys.flag(key, False) for key in ("add_bos_token", "add_eos_token")]
    return AffixTokens(*ids, *adds)  # type: ignore[arg-type]  # two of each


def _byte_level(metadata: Mapping[str, MetadataValue]) -> Tokenizer:
    keys = TokenizerKeys(metadata)
    tokens = keys.tokens()
    types = keys.types(len(tokens))
    rule = pretokenizer_named(keys.get("pre"))
    if not keys.get("pre"):
        keys.warnings.append(
            "tokenizer.ggml.pre, the rule that splits text into words, is missing: a general rule is used, and answers can be bad; "
            "the file is older than April 2024, so fetch or convert a newer one"
        )
    control = {token: id_ for id_, token in enumerate(tokens) if types[id_] in (CONTROL, UNKNOWN) and token}
    bpe = _bpe(tokens, types, _merges(keys, tokens, types), whole_words=rule.whole_words)
    if (normalizer := rule.normalizer()) is not None:
        bpe.normalizer = normalizer
    bpe.pre_tokenizer = rule.pre_tokenizer()
    added = (tokens[id_] for id_, type_ in enumerate(types) if type_ == USER_DEFINED and tokens[id_])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in added])
    bos, eos = (keys.special(key, types) for key in ("bos_token_id", "eos_token_id"))
    prefix = (bos,) if bos is not None and keys.flag("add_bos_token", rule.adds_bos) else ()
    return Tokenizer(
        bpe,
        Vocabulary(
            tokens=tokens,
            control=control,
            verbatim=frozenset(id_ for id_, type_ in enumerate(types) if type_ in (CONTROL, UNKNOWN, USER_DEFINED)),
        ),
        bos=bos,
        eos=eos,
        prefix=prefix,
        chat_prefix=prefix,
        suffix=(eos,) if eos is not None and keys.flag("add_eos_token", False) else (),
        warnings=tuple(keys.warnings),
    )


def _merges(keys: TokenizerKeys, tokens: tuple[str, ...], types: tuple[MetadataValue, ...]) -> list[tuple[str, str]]:
    """Read the merges. A file of the kind `kimi-k2` may lack them: its tokens are in the order in which they are merged."""
    if keys.get("merges") is None and keys.get("pre") == "kimi-k2":
        scores = {token: -float(id_) for id_, token in enumerate(tokens) if types[id_] == NORMAL and token}
        return merges_of(scores, scores)
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in keys.strings("merges"))]


def _bpe(
    tokens: tuple[str, ...], types: tuple[MetadataValue, ...], merges: list[tuple[str, str]], *, whole_words: bool
) -> tokenizers.Tokenizer:
    ids = ids_of(tokens, types)
    with library_errors(lambda why: wrong("merges", why)):
        return tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=whole_words))
