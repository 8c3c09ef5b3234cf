"""SentencePiece's BPE, which GGUF files call `llama`: pieces with scores, and byte tokens for text that no piece covers.

The vocabulary has no list of merges: two adjacent pieces are merged if the result is a piece, the highest score first. The
tokenizers library needs such a list. `merges_of` makes it, in the same order as transformers does when it converts such models.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import tokenizers
from tokenizers import AddedToken, models, normalizers

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.text.tokenizer.gguf_keys import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, TokenizerKeys, ids_of, wrong
from meshd.models.text.tokenizer.spelling import WORD_START, sentencepiece
from meshd.models.text.tokenizer.tokenizer import Tokenizer, Vocabulary, library_errors

MAX_PIECE = 512
MAX_CHARACTERS = 1 << 23
MAX_MERGES = 1 << 20
"""MAX_PIECE, MAX_CHARACTERS and MAX_MERGES bound the time and the result of `merges_of`, which tries every split of every piece.
Gemma's 262,144 pieces have 1.5 million characters, at most 31 each, and give half a million merges."""
_KEEPS_RIGHT_SPACE = {"phi3": frozenset({"<unk>", "<s>", "<|endoftext|>"})}
"""Architecture whose control and added tokens strip the white space after them -> tokens that do not. No GGUF key states this."""


def spm_from_gguf(metadata: Mapping[str, MetadataValue]) -> Tokenizer:
    """Rebuild the tokenizer of a file whose `tokenizer.ggml.model` is `llama`. Raises: ModelFileError."""
    keys = TokenizerKeys(metadata)
    if keys.flag("remove_extra_whitespaces", False):
        raise wrong("remove_extra_whitespaces", "true is not supported")
    tokens = keys.tokens()
    types, scores = keys.types(len(tokens)), keys.scores(len(tokens))
    pieces = [_piece(token, type_) for token, type_ in zip(tokens, types, strict=True)]
    runs = [piece for piece, type_ in zip(pieces, types, strict=True) if type_ != UNUSED and piece and not piece.strip(WORD_START)]
    if len(set(runs)) != len(runs):
        raise wrong("tokens", "it has a run of spaces twice")
    unknown = keys.special("unknown_token_id", types)
    spaced = keys.flag("add_space_prefix", True)
    control = {token: id_ for id_, token in enumerate(tokens) if types[id_] in (CONTROL, UNKNOWN) and token}
    added = {piece for id_, piece in enumerate(pieces) if types[id_] == USER_DEFINED and piece}
    strips_right = _strips_right(metadata, control.keys() | added)
    bpe = _bpe(ids_of(pieces, types), _ranked(pieces, types, scores), None if unknown is None else tokens[unknown])
    bpe.normalizer = _normalizer(spaced)
    bpe.add_tokens([AddedToken(token, normalized=False, rstrip=token in strips_right) for token in sorted(added)])
    bos, eos = (keys.special(key, types) for key in ("bos_token_id", "eos_token_id"))
    prefix = (bos,) if bos is not None and keys.flag("add_bos_token", True) else ()
    return Tokenizer(
        bpe,
        Vocabulary(tokens=pieces, control=control, spelling=sentencepiece, strips_right=strips_right & control.keys()),
        bos=bos,
        eos=eos,
        prefix=prefix,
        chat_prefix=prefix,
        suffix=(eos,) if eos is not None and keys.flag("add_eos_token", False) else (),
        leading_space=spaced,
        warnings=tuple(keys.warnings),
    )


def merges_of(pieces: Iterable[str], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List all pairs of pieces whose concatenation has a score: the highest score first, then the longest left part.

    `scores` must be in the order of the vocabulary, which decides ties.

    Raises: ModelFileError if the pieces exceed MAX_PIECE, MAX_CHARACTERS or MAX_MERGES.
    """
    if max(map(len, scores), default=0) > MAX_PIECE or sum(map(len, scores)) > MAX_CHARACTERS:
        raise wrong("tokens", f"a piece has more than {MAX_PIECE} characters, or all have more than {MAX_CHARACTERS:,}")
    known = frozenset(pieces)
    merges: list[tuple[str, str]] = []
    best_first = sorted(scores, key=scores.__getitem__, reverse=True)
    for _, tied in groupby(best_first, scores.__getitem__):
        cuts = [
            (left, right)
            for piece in tied
            for at in range(len(piece) - 1, 0, -1)
            if (left := piece[:at]) in known and (right := piece[at:]) in known
        ]
        merges += sorted(cuts, key=_lengths, reverse=True) if len(cuts) > 1 else cuts
        if len(merges) > MAX_MERGES:
            raise wrong("tokens", f"its pieces are made of one another in more than {MAX_MERGES:,} ways")
    return merges


def _lengths(cut: tuple[str, str]) -> tuple[int, int]:
    return len(cut[0]), len(cut[1])


def _piece(token: str, type_: MetadataValue) -> str:
    """Spell an added token that is a run of spaces with WORD_START, since BPE merges run on text whose spaces are WORD_START."""
    return WORD_START * len(token) if type_ == USER_DEFINED and not token.strip(f" {WORD_START}") else token


def _ranked(pieces: Sequence[str], types: Sequence[MetadataValue], scores: Sequence[float]) -> dict[str, float]:
    """Return the scores of the pieces that merges may make: ordinary pieces, and added runs of spaces with the top score."""
    first = max(scores, default=0.0) + 1
    unranked = (UNKNOWN, CONTROL, BYTE, USER_DEFINED)
    ranked = {piece: scores[id_] for id_, piece in enumerate(pieces) if piece and types[id_] not in unranked}
    runs = (piece for id_, piece in enumerate(pieces) if types[id_] == USER_DEFINED and not piece.strip(WORD_START))
    return ranked | dict.fromkeys(runs, first)


def _bpe(vocabulary: dict[str, int], scores: Mapping[str, float], unknown: str | None) -> tokenizers.Tokenizer:
    merges = merges_of(vocabulary, scores)
    with library_errors(lambda why: ModelFileError(f"the tokenizer can't be used: {why}")):
        return tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))


def _normalizer(spaced: bool) -> normalizers.Normalizer:
    mark = normalizers.Replace(" ", WORD_START)
    return normalizers.Sequence([normalizers.Prepend(WORD_START), mark]) if spaced else mark


def _strips_right(metadata: Mapping[str, MetadataValue], special: Iterable[str]) -> frozenset[str]:
    others = _KEEPS_RIGHT_SPACE.get(str(metadata.get("general.architecture")))
    return frozenset() if others is None else frozenset(special) - others
