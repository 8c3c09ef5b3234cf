"""Text to token ids and back, for byte-level BPE vocabularies (GPT-2's kind, which Llama 3, Qwen and SmolLM share)."""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tokenizers

from meshd.errors import InvalidRequest
from meshd.models.template import ChatTemplate, Message

_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Unicode keeps these for use inside a program; no text has a meaning for them."""


def _byte_of() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, and which of them are no ordinary text."""

    tokens: Sequence[str]
    """As the vocabulary spells them: one character per byte."""
    control: Mapping[str, int]
    """Tokens that steer the model; text never becomes one unless it is asked to."""
    verbatim: frozenset[int]
    """Tokens spelt as they read: the control tokens, and those that the model's makers added."""


class Tokenizer:
    """One model's vocabulary. Immutable and safe to share between threads."""

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        *,
        bos: int | None = None,
        eos: int | None = None,
        prefix: tuple[int, ...] = (),
        suffix: tuple[int, ...] = (),
    ) -> None:
        """`bpe` splits plain text and must not know control tokens; `prefix` and `suffix` are what `add_special` adds."""
        self._bpe = bpe
        self._vocabulary = vocabulary
        self._control_ids = frozenset(vocabulary.control.values())
        longest_first = sorted(vocabulary.control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.bos = bos
        self.eos = eos
        self._prefix = prefix
        self._suffix = suffix

    def __len__(self) -> int:
        """How many token ids there are."""
        return len(self._vocabulary.tokens)

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        `add_special` puts what the model expects around a text (often BOS, often nothing). With `parse_special`, control tokens
        spelt out in the text become themselves; otherwise they are text like any other. Raises: InvalidRequest for text that
        UTF-8 can't hold (a lone surrogate).
        """
        ids = list(self._encode_parts(text)) if parse_special else self._encode_plain(text)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def encode_chat(self, template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation. Control tokens come from the template alone: those that a message spells out stay text.

        In each message a character that no text uses is put inside every such spelling, so that it is not found in the rendered
        prompt, and taken out again before the text around it is encoded. Raises: InvalidRequest.
        """
        guard = _unused(messages)
        guarded = [{key: self._guarded(value, guard) for key, value in message.items()} for message in messages]
        prompt = template.render(guarded, add_generation_prompt=add_generation_prompt)
        return list(self._encode_parts(prompt, guard))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of tokens; bytes that are no UTF-8 are shown as U+FFFD."""
        return b"".join(self.shown_bytes(id_, skip_special) for id_ in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id_: int) -> bytes:
        """What a token stands for: often no whole character. A control token's is its name; an unknown id's is empty."""
        if not 0 <= id_ < len(self._vocabulary.tokens):
            return b""
        token = self._vocabulary.tokens[id_]
        if id_ in self._vocabulary.verbatim:
            return token.encode()
        return b"".join(_spelt(character) for character in token)

    def is_control(self, id_: int) -> bool:
        """Whether a token steers the model rather than standing for text."""
        return id_ in self._control_ids

    def stream(self, *, skip_special: bool = True) -> "StreamDecoder":
        """A decoder for one answer's tokens as they come."""
        return StreamDecoder(self, skip_special)

    def shown_bytes(self, id_: int, skip_special: bool) -> bytes:
        """What a reader is to see of a token."""
        return b"" if skip_special and id_ in self._control_ids else self.token_bytes(id_)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text can't be encoded: {error.reason} at character {error.start}") from error
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _encode_parts(self, text: str, guard: str = "") -> Iterator[int]:
        """Control tokens as themselves, what lies between them as plain text without the guard."""
        position = 0
        for match in self._control_pattern.finditer(text):
            yield from self._encode_plain(_without(text[position : match.start()], guard))
            yield self._vocabulary.control[match[0]]
            position = match.end()
        yield from self._encode_plain(_without(text[position:], guard))

    def _guarded(self, text: str, guard: str) -> str:
        return self._control_pattern.sub(lambda match: match[0][:1] + guard + match[0][1:], text)


class StreamDecoder:
    """Turns one answer's tokens into text of whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """The characters that this token completes: none while one is still in pieces.

        Bytes that can't begin or continue any character become U+FFFD, as in `Tokenizer.decode`.
        """
        return self._decoder.decode(self._tokenizer.shown_bytes(id_, self._skip_special))

    def flush(self) -> str:
        """Ends the answer. A character that its end cut in pieces is dropped, so that nothing broken is shown."""
        self._decoder.reset()
        return ""


def _spelt(character: str) -> bytes:
    byte = _BYTE_OF.get(character)
    return character.encode() if byte is None else bytes((byte,))


def _unused(messages: Sequence[Message]) -> str:
    """A character that is in no message."""
    used = set().union(*(value for message in messages for value in message.values()))
    guard = next((character for character in _NONCHARACTERS if character not in used), None)
    if guard is None:
        raise InvalidRequest("the messages can't be encoded: they use every one of Unicode's noncharacters", param="messages")
    return guard


def _without(text: str, guard: str) -> str:
    return text.replace(guard, "") if guard else text
