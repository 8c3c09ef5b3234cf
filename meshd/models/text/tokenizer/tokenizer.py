"""Text to token ids and back, for byte-level BPE (GPT-2's kind: Llama 3, Qwen, SmolLM) and SentencePiece BPE (Llama 2, Gemma)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers

from meshd.errors import InvalidRequest, MeshdError
from meshd.models.text.template import ChatTemplate, Message
from meshd.models.text.token_table import TokenTable, joined
from meshd.models.text.tokenizer.control_tokens import ControlTokens, remove_mark, unused_mark
from meshd.models.text.tokenizer.spelling import byte_level


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, and how they are spelt."""

    tokens: Sequence[str]
    """Tokens as the vocabulary spells them, except those in `verbatim`; the index is the id."""
    control: Mapping[str, int]
    """Control token -> id. Text that spells a control token is encoded to it only if the caller asks for that."""
    verbatim: frozenset[int] = frozenset()
    """Ids of control and added tokens that `tokens` has as plain text, not in the vocabulary's spelling."""
    spelling: Callable[[str], bytes] = byte_level
    """Decodes a token in the vocabulary's spelling to its bytes."""
    strips_left: frozenset[str] = frozenset()
    """Control tokens that strip the white space before them."""
    strips_right: frozenset[str] = frozenset()
    """Control tokens that strip the white space after them."""

    def bytes_of_tokens(self) -> Iterator[bytes]:
        """Yield the bytes of each token, in the order of the ids."""
        for id_, token in enumerate(self.tokens):
            yield token.encode("utf-8", errors="replace") if id_ in self.verbatim else self.spelling(token)


class Tokenizer(TokenTable):
    """Encodes and decodes text with one model's vocabulary. Immutable and safe to share between threads."""

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        *,
        after_control: tokenizers.Tokenizer | None = None,
        bos: int | None = None,
        eos: int | None = None,
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        chat_prefix: tuple[int, ...] = (),
        leading_space: bool = False,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """`bpe` encodes plain text and must not know control tokens.

        `after_control` encodes text after a control token; None: `bpe` does. `encode` with `add_special` puts `prefix` before a
        text and `suffix` after it. `encode_chat` puts `chat_prefix` before a conversation. A prefix that the
        text or the template spells itself is not added. `leading_space`: whether `bpe` puts a space before a text, which `decode`
        then removes.
        `warnings`: what was odd in the file, and what is done instead.
        """
        pieces, ends = joined(vocabulary.bytes_of_tokens())
        super().__init__(pieces, ends, vocabulary.control.values(), leading_space=leading_space)
        self._bpe = bpe
        self._bpe_after_control = after_control or bpe
        self._control_tokens = vocabulary.control
        self._control = ControlTokens(vocabulary.control, strips_left=vocabulary.strips_left, strips_right=vocabulary.strips_right)
        self.bos = bos
        self.eos = eos
        self._prefix = prefix
        self._suffix = suffix
        self._chat_prefix = chat_prefix
        self.warnings = warnings

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Encode a text to token ids.

        `add_special` adds the tokens that the model expects around a text (often BOS, often none). With `parse_special`, the
        spelling of a control token becomes that token; otherwise it is encoded like any other text.

        Raises: InvalidRequest for text that UTF-8 can't encode (a lone surrogate), or on which the vocabulary's patterns fail.
        """
        ids = list(self._encode_parts(text)) if parse_special else self._encode_plain(text, self._bpe)
        return [*_missing(self._prefix, ids), *ids, *self._suffix] if add_special else ids

    def encode_chat(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Encode a conversation to token ids. `tools` and `variables` are as in `ChatTemplate.render`.

        Only the template can write control tokens: their spellings in messages, tools and variables stay text. See
        `meshd.models.text.tokenizer.control_tokens` for the method.

        Raises: InvalidRequest.
        """
        given = (list(messages), None if tools is None else list(tools), variables or {})
        mark = unused_mark(given)
        turns, functions, others = self._control.insert_mark(given, mark)
        prompt = template.render(turns, tools=functions, add_generation_prompt=add_generation_prompt, variables=others)
        ids = list(self._encode_parts(prompt, mark))
        return [*_missing(self._chat_prefix, ids), *ids]

    def _encode_plain(self, text: str, bpe: tokenizers.Tokenizer) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text can't be encoded: {error.reason} at character {error.start}") from error
        with library_errors(lambda why: InvalidRequest(f"the text can't be encoded: the tokenizer's patterns fail on it ({why})")):
            # The fast kind keeps no offsets, which would take a hundred bytes for each byte of a long text.
            return bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode_parts(self, text: str, mark: str = "") -> Iterator[int]:
        """Encode control tokens as such, and the text between them, without the mark, as plain text."""
        position, bpe = 0, self._bpe
        for found in self._control.find(text):
            yield from self._encode_plain(remove_mark(text[position : found.start], mark), bpe)
            yield self._control_tokens[found.token]
            position, bpe = found.end, self._bpe_after_control
        yield from self._encode_plain(remove_mark(text[position:], mark), bpe)


def _missing(prefix: tuple[int, ...], ids: list[int]) -> tuple[int, ...]:
    """Return the prefix, or nothing if the ids begin with it."""
    return () if ids[: len(prefix)] == list(prefix) else prefix


@contextmanager
def library_errors(as_error: Callable[[str], MeshdError]) -> Iterator[None]:
    """Raise `as_error(message)` for every error of the tokenizers library in this context.

    The library raises bare Exception, and panics that derive from BaseException.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not type(error).__module__.startswith("pyo3"):
            raise
        raise as_error(str(error)) from error
