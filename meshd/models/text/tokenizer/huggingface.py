"""Build the tokenizer that a `tokenizer.json` describes."""

import copy
from dataclasses import dataclass

import tokenizers

from meshd.models.text.tokenizer.document import MAX_ID, TokenizerDocument
from meshd.models.text.tokenizer.spelling import byte_level, sentencepiece
from meshd.models.text.tokenizer.tokenizer import Tokenizer, Vocabulary, library_errors


@dataclass(frozen=True, slots=True)
class AffixTokens:
    """The BOS and EOS settings of a model file, which override those of its `tokenizer.json`. None: the file does not set this."""

    bos: int | None = None
    eos: int | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None


NO_AFFIXES = AffixTokens()


def tokenizer_of(document: TokenizerDocument, affixes: AffixTokens = NO_AFFIXES) -> Tokenizer:
    """Build a document's tokenizer. Raises: ModelFileError."""
    bpe = _loaded(document, document.text)
    tokens = _tokens(document, bpe)
    bos, eos = (id_ if id_ is not None and 0 <= id_ < len(tokens) else None for id_ in (affixes.bos, affixes.eos))
    prefix, suffix = _affixes_of(document, bpe)
    if affixes.add_bos is not None and bos is not None:
        prefix = (bos,) if affixes.add_bos else ()
    if affixes.add_eos is not None and eos is not None:
        suffix = (eos,) if affixes.add_eos else ()
    bpe.encode_special_tokens = True
    return Tokenizer(
        bpe,
        _vocabulary(document, tokens),
        after_control=_after_control(document, bpe),
        bos=bos,
        eos=eos,
        prefix=prefix,
        chat_prefix=prefix if affixes.add_bos else (),
        suffix=suffix,
        leading_space="Strip" in document.kinds(document.decoder),
        warnings=tuple(
            f"the file names token {named} as {role}, which is no token of the {len(tokens)}: none is used for it"
            for role, named, used in (("BOS", affixes.bos, bos), ("EOS", affixes.eos, eos))
            if named is not None and used is None
        ),
    )


def _vocabulary(document: TokenizerDocument, tokens: list[str]) -> Vocabulary:
    control = [token for token in document.added if token.special and token.content]
    byte_spelt = "ByteLevel" in document.kinds(document.decoder)
    return Vocabulary(
        tokens=tokens,
        control={token.content: token.id for token in control},
        verbatim=frozenset(token.id for token in document.added) if byte_spelt else frozenset(),
        spelling=byte_level if byte_spelt else sentencepiece,
        strips_left=frozenset(token.content for token in control if token.lstrip),
        strips_right=frozenset(token.content for token in control if token.rstrip),
    )


def _loaded(document: TokenizerDocument, text: str) -> tokenizers.Tokenizer:
    with library_errors(document.unusable):
        bpe: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
    bpe.no_truncation()
    bpe.no_padding()
    bpe.model.dropout = None  # with dropout, encodings would be random
    return bpe


def _tokens(document: TokenizerDocument, bpe: tokenizers.Tokenizer) -> list[str]:
    ids = bpe.get_vocab(with_added_tokens=True)
    largest = max(ids.values(), default=-1)
    if largest >= MAX_ID:
        raise document.wrong(f"can't be used: its token id {largest} is over {MAX_ID - 1}")
    tokens = [""] * (largest + 1)
    for token, id_ in ids.items():
        tokens[id_] = token
    for added in document.added:
        if ids.get(added.content) != added.id:
            raise document.wrong(f"can't be used: its added token {added.content[:80]!r} is not token {added.id}")
    return tokens


def _affixes_of(document: TokenizerDocument, bpe: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the tokens that the post-processor puts before and after a text."""
    with library_errors(document.unusable):
        encoded = bpe.encode("a", add_special_tokens=True)
    text = [at for at, special in enumerate(encoded.special_tokens_mask) if not special] or [len(encoded.ids)]
    return tuple(encoded.ids[: text[0]]), tuple(encoded.ids[text[-1] + 1 :])


def _after_control(document: TokenizerDocument, bpe: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """Build a tokenizer for text after a control token, if the pre-tokenizer puts a space only before the beginning of a prompt.

    Returns: None if `bpe` can also encode text after a control token.
    """
    pre_tokenizer = copy.deepcopy(document.pre_tokenizer)
    metaspaces = [step for step in document.steps(pre_tokenizer) if step["type"] == "Metaspace"]
    first = [step for step in metaspaces if step.get("prepend_scheme") == "first"]
    if not first:
        return None
    for step in first:
        step["prepend_scheme"] = "never"
        step.pop("add_prefix_space", None)
    after_control = _loaded(document, document.with_pre_tokenizer(pre_tokenizer))
    after_control.model = bpe.model  # share the vocabulary instead of holding it twice
    after_control.encode_special_tokens = True
    return after_control
