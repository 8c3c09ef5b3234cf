"""Text to token ids and back, for byte-level BPE (GPT-2's kind: Llama 3, Qwen, SmolLM) and SentencePiece BPE (Llama 2, Gemma)."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers

from meshd.errors import InvalidRequest, MeshdError
from meshd.models.text.template import ChatTemplate, Message
from meshd.models.text.tokenizer.control_tokens import ControlTokens, unused_mark, without
from meshd.models.text.tokenizer.spelling import byte_level


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, and which of them are no ordinary text."""

    tokens: Sequence[str]
    """As the vocabulary spells them."""
    control: Mapping[str, int]
    """Tokens that steer the model; text never becomes one unless it is asked to."""
    verbatim: frozenset[int] = frozenset()
    """Tokens spelt as they read, whatever `spelling` says."""
    spelling: Callable[[str], bytes] = byte_level
    takes_left: frozenset[str] = frozenset()
    """Control tokens that swallow the white space before them."""
    takes_right: frozenset[str] = frozenset()
    """Control tokens that swallow the white space after them."""


class Tokenizer:
    """One model's vocabulary. Immutable and safe to share between threads."""

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        *,
        later: tokenizers.Tokenizer | None = None,
        bos: int | None = None,
        eos: int | None = None,
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
        leading_space: bool = False,
    ) -> None:
        """`bpe` splits plain text and must not know control tokens.

        `later` does so for text after a control token, where that differs. `prefix` and `suffix` are what `add_special` adds.
        `leading_space`: `bpe` puts a space before a text, so that `decode` takes one away.
        """
        self._bpe = bpe
        self._later = later or bpe
        self._vocabulary = vocabulary
        self._control_ids = frozenset(vocabulary.control.values())
        self._control = ControlTokens(vocabulary.control, takes_left=vocabulary.takes_left, takes_right=vocabulary.takes_right)
        self.bos = bos
        self.eos = eos
        self._prefix = prefix
        self._suffix = suffix
        self.leading_space = leading_space

    def __len__(self) -> int:
        """How many token ids there are."""
        return len(self._vocabulary.tokens)

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        `add_special` puts what the model expects around a text (often BOS, often nothing). With `parse_special`, control tokens
        spelt out in the text become themselves; otherwise they are text like any other. Raises: InvalidRequest for text that
        UTF-8 can't hold (a lone surrogate), and for what the vocabulary's patterns can't cut.
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
        """Token ids of a conversation; `tools` and `variables` are as in `ChatTemplate.render`.

        Control tokens come from the template alone: those that its input spells out stay text.

        In every text of the input, however deep, a character that no text uses is put inside each such spelling, so that it is
        not found in the rendered prompt, and taken out again before the text around it is encoded. Raises: InvalidRequest.
        """
        given = (list(messages), None if tools is None else list(tools), variables or {})
        mark = unused_mark(given)
        turns, functions, others = self._control.broken(given, mark)
        prompt = template.render(turns, tools=functions, add_generation_prompt=add_generation_prompt, variables=others)
        return list(self._encode_parts(prompt, mark))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of tokens; bytes that are no UTF-8 are shown as U+FFFD."""
        text = b"".join(self.shown_bytes(id_, skip_special) for id_ in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.leading_space else text

    def token_bytes(self, id_: int) -> bytes:
        """What a token stands for: often no whole character. A control token's is its name; an unknown id's is empty."""
        if not 0 <= id_ < len(self._vocabulary.tokens):
            return b""
        token = self._vocabulary.tokens[id_]
        return token.encode() if id_ in self._vocabulary.verbatim else self._vocabulary.spelling(token)

    def is_control(self, id_: int) -> bool:
        """Whether a token steers the model rather than standing for text."""
        return id_ in self._control_ids

    def stream(self, *, skip_special: bool = True, after: int | None = None) -> "StreamDecoder":
        """A decoder for one answer's tokens as they come.

        `after` is the token before the answer. Where that is text, the answer goes on with it: a space that it begins with
        parts two words, and is kept. Otherwise what is streamed is what `decode` gives.
        """
        goes_on = after is not None and not self.is_control(after)
        return StreamDecoder(self, skip_special, takes_space=self.leading_space and not goes_on)

    def shown_bytes(self, id_: int, skip_special: bool) -> bytes:
        """What a reader is to see of a token."""
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
        """Control tokens as themselves, what lies between them as plain text without the mark."""
        position, bpe = 0, self._bpe
        for found in self._control.find(text):
            yield from self._encode_plain(without(text[position : found.start], mark), bpe)
            yield self._vocabulary.control[found.token]
            position, bpe = found.end, self._later
        yield from self._encode_plain(without(text[position:], mark), bpe)


class StreamDecoder:
    """Turns one answer's tokens into text of whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, *, takes_space: bool = False) -> None:
        """`takes_space`: a space that the text begins with is not shown."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._takes_space = takes_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """The characters that this token completes: none while one is still in pieces.

        Bytes that can't begin or continue any character become U+FFFD, as in `Tokenizer.decode`.
        """
        text = self._decoder.decode(self._tokenizer.shown_bytes(id_, self._skip_special))
        if text and self._takes_space:
            self._takes_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """Ends the answer. A character that its end cut in pieces is dropped, so that nothing broken is shown."""
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
