"""Text to token ids and back, for byte-level BPE (GPT-2's kind: Llama 3, Qwen, SmolLM) and SentencePiece BPE (Llama 2, Gemma)."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

from meshd.errors import InvalidRequest, MeshdError
from meshd.models.text.template import ChatTemplate, Message
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


class Tokenizer:
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
        leading_space: bool = False,
    ) -> None:
        """`bpe` encodes plain text and must not know control tokens.

        `after_control` encodes text after a control token; None: `bpe` does. `encode` with `add_special` puts `prefix` before a
        text and `suffix` after it. `leading_space`: whether `bpe` puts a space before a text, which `decode` then removes.
        """
        self._bpe = bpe
        self._bpe_after_control = after_control or bpe
        self._vocabulary = vocabulary
        self._control_ids = frozenset(vocabulary.control.values())
        self._control = ControlTokens(vocabulary.control, strips_left=vocabulary.strips_left, strips_right=vocabulary.strips_right)
        self.bos = bos
        self.eos = eos
        self._prefix = prefix
        self._suffix = suffix
        self.leading_space = leading_space

    @cached_property
    def longest_bytes(self) -> int:
        """Size of the longest token in bytes."""
        return max((len(self.token_bytes(id_)) for id_ in range(len(self))), default=1)

    def __len__(self) -> int:
        """Return the number of token ids."""
        return len(self._vocabulary.tokens)

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Encode a text to token ids.

        `add_special` adds the tokens that the model expects around a text (often BOS, often none). With `parse_special`, the
        spelling of a control token becomes that token; otherwise it is encoded like any other text.

        Raises: InvalidRequest for text that UTF-8 can't encode (a lone surrogate), or on which the vocabulary's patterns fail.
        """
        ids = list(self._encode_parts(text)) if parse_special else self._encode_plain(text, self._bpe)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

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
        return list(self._encode_parts(prompt, mark))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode tokens to text. Bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.shown_bytes(id_, skip_special) for id_ in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.leading_space else text

    def token_bytes(self, id_: int) -> bytes:
        """Return a token's bytes, which may be a part of a character. For a control token: its name; for an unknown id: none."""
        if not 0 <= id_ < len(self._vocabulary.tokens):
            return b""
        token = self._vocabulary.tokens[id_]
        return token.encode() if id_ in self._vocabulary.verbatim else self._vocabulary.spelling(token)

    def is_control(self, id_: int) -> bool:
        """Whether a token steers the model rather than standing for text."""
        return id_ in self._control_ids

    def stream(self, *, skip_special: bool = True, after: int | None = None) -> "StreamDecoder":
        """Make a decoder for the tokens of one answer as they arrive.

        `after` is the last token before the answer. If it is text, the answer continues that text, and a space at the beginning of
        the answer is kept, since it separates two words. Otherwise such a space is removed as `decode` does.
        """
        continues = after is not None and not self.is_control(after)
        return StreamDecoder(self, skip_special, strips_space=self.leading_space and not continues)

    def shown_bytes(self, id_: int, skip_special: bool) -> bytes:
        """Return the bytes that are shown for a token: none for a control token with `skip_special`."""
        return b"" if skip_special and id_ in self._control_ids else self.token_bytes(id_)

    def _encode_plain(self, text: str, bpe: tokenizers.Tokenizer) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text can't be encoded: {error.reason} at character {error.start}") from error
        with library_errors(lambda why: InvalidRequest(f"the text can't be encoded: the tokenizer's patterns fail on it ({why})")):
            return bpe.encode(text, add_special_tokens=False).ids

    def _encode_parts(self, text: str, mark: str = "") -> Iterator[int]:
        """Encode control tokens as such, and the text between them, without the mark, as plain text."""
        position, bpe = 0, self._bpe
        for found in self._control.find(text):
            yield from self._encode_plain(remove_mark(text[position : found.start], mark), bpe)
            yield self._vocabulary.control[found.token]
            position, bpe = found.end, self._bpe_after_control
        yield from self._encode_plain(remove_mark(text[position:], mark), bpe)


class StreamDecoder:
    """Turns one answer's tokens into text of whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, *, strips_space: bool = False) -> None:
        """`strips_space`: a space at the beginning of the text is removed."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strips_space = strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """Decode one more token. Bytes that can't begin or continue a character become U+FFFD, as in `Tokenizer.decode`.

        Returns: the characters that this token completes; empty while a character is incomplete.
        """
        text = self._decoder.decode(self._tokenizer.shown_bytes(id_, self._skip_special))
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """End the answer and drop an incomplete last character. Returns: an empty text."""
        self._decoder.reset()
        return ""


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
