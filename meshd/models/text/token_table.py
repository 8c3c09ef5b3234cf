"""Tokens to text: the bytes of every token, and a decoder for an answer's tokens as they arrive. Needs no tokenizer library."""

import codecs
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

IDS = "I"
"""Type code of arrays of token ids and of offsets: unsigned 32 bits."""


_THINK, _END_THINK = b"<think>", b"</think>"
_THOUGHTS = {
    _THINK: _THINK,
    _END_THINK: _END_THINK,
    b"[THINK]": _THINK,
    b"[/THINK]": _END_THINK,
    b"<seed:think>": _THINK,
    b"</seed:think>": _END_THINK,
    b"<|START_THINKING|>": _THINK,
    b"<|END_THINKING|>": _END_THINK,
}
"""Control tokens around what a model thinks before it answers -> how they are shown: without them, a thought would run into the
answer. In most vocabularies they are ordinary tokens."""
_CHANNEL, _MESSAGE, _START = b"<|channel|>", b"<|message|>", b"<|start|>"
_MAX_HEADER = 64
"""Characters of a message's header that are read."""
_ENDS = (b"<|end|>", b"<|return|>", b"<|call|>")


class TokenTable:
    """The bytes of each token. Immutable and safe to share between threads. Takes the tokens' bytes and 4 bytes more for each."""

    def __init__(self, pieces: bytes, ends: Sequence[int], control: Collection[int], *, leading_space: bool = False) -> None:
        """`pieces`: the bytes of all tokens, in the order of their ids. `ends`: where each token's bytes end.

        `control`: ids of the tokens that steer the model rather than standing for text. `leading_space`: whether encoding puts a
        space before a text, which decoding then removes.
        """
        self.pieces = pieces
        self.ends = ends
        self.control_ids = frozenset(control)
        self.leading_space = leading_space
        control_names = {self.token_bytes(id_): id_ for id_ in self.control_ids}
        self._shown_control = {id_: _THOUGHTS[name] for name, id_ in control_names.items() if name in _THOUGHTS}
        self._channels = _Channels.of(control_names)
        self.longest_bytes = max((end - start for start, end in pairwise((0, *ends))), default=0)
        """Size of the longest token, in bytes."""

    @classmethod
    def of(cls, tokens: Iterable[bytes], control: Collection[int], *, leading_space: bool = False) -> "TokenTable":
        """Make a table from the bytes of each token."""
        pieces, ends = joined(tokens)
        return TokenTable(pieces, ends, control, leading_space=leading_space)

    def __len__(self) -> int:
        """Return the number of token ids."""
        return len(self.ends)

    @property
    def nbytes(self) -> int:
        """Memory that the table takes, in bytes."""
        return len(self.pieces) + 4 * len(self.ends) + 64 * len(self.control_ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode tokens to text. Bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.shown_bytes(id_, skip_special) for id_ in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.leading_space else text

    def token_bytes(self, id_: int) -> bytes:
        """Return a token's bytes, which may be a part of a character. For a control token: its name; for an unknown id: none."""
        if not 0 <= id_ < len(self.ends):
            return b""
        return self.pieces[self.ends[id_ - 1] if id_ else 0 : self.ends[id_]]

    def is_control(self, id_: int) -> bool:
        """Whether a token steers the model rather than standing for text."""
        return id_ in self.control_ids

    def stream(self, *, skip_special: bool = True, after: int | None = None) -> "StreamDecoder | ChannelDecoder":
        """Make a decoder for the tokens of one answer as they arrive.

        `after` is the last token before the answer. If it is text, the answer continues that text, and a space at the beginning of
        the answer is kept, since it separates two words. Otherwise such a space is removed as `decode` does.
        """
        continues = after is not None and not self.is_control(after)
        plain = StreamDecoder(self, skip_special, strips_space=self.leading_space and not continues)
        return ChannelDecoder(plain, self._channels) if self._channels is not None and skip_special else plain

    def shown_bytes(self, id_: int, skip_special: bool) -> bytes:
        """Return the bytes that are shown for a token.

        With `skip_special`, control tokens are not shown, but for those around a thought, which become `<think>` and `</think>`.
        """
        if skip_special and id_ in self.control_ids:
            return self._shown_control.get(id_, b"")
        return self.token_bytes(id_)


class StreamDecoder:
    """Turns one answer's tokens into text of whole characters."""

    def __init__(self, table: TokenTable, skip_special: bool, *, strips_space: bool = False) -> None:
        """`strips_space`: a space at the beginning of the text is removed."""
        self._table = table
        self._skip_special = skip_special
        self._strips_space = strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """Decode one more token. Bytes that can't begin or continue a character become U+FFFD, as in `TokenTable.decode`.

        Returns: the characters that this token completes; empty while a character is incomplete.
        """
        text = self._decoder.decode(self._table.shown_bytes(id_, self._skip_special))
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """End the answer and drop an incomplete last character. Returns: an empty text."""
        self._decoder.reset()
        return ""


@dataclass(frozen=True, slots=True)
class _Channels:
    """Ids of the control tokens of gpt-oss, whose answer is several messages, each with a header that names its channel."""

    channel: int
    message: int
    start: int
    ends: frozenset[int]

    @staticmethod
    def of(control: Mapping[bytes, int]) -> "_Channels | None":
        """Find the tokens by their names. Returns: None if the vocabulary lacks one of them."""
        if not control.keys() >= {_CHANNEL, _MESSAGE, _START, _ENDS[0]}:
            return None
        ends = frozenset(control[name] for name in _ENDS if name in control)
        return _Channels(control[_CHANNEL], control[_MESSAGE], control[_START], ends)


class ChannelDecoder:
    """Turns an answer of several messages into the text of one: headers are left out, and an analysis becomes a thought.

    A message: `<|start|>` role `<|channel|>` channel `<|message|>` text `<|end|>`. Text outside of messages is shown as it is.
    """

    def __init__(self, plain: StreamDecoder, channels: _Channels) -> None:
        self._plain = plain
        self._channels = channels
        self._header: str | None = None
        """The text of the header that is being read; None: a message's text is being read."""
        self._thinking = False

    def push(self, id_: int) -> str:
        """Decode one more token. Returns: the characters that this token completes."""
        channels = self._channels
        if id_ in (channels.start, channels.channel):
            self._header = ""
            return self._think(False)
        if id_ == channels.message and self._header is not None:
            analysis, self._header = self._header.strip().startswith("analysis"), None
            return self._think(analysis)
        if id_ in channels.ends:
            return self._think(False)
        text = self._plain.push(id_)
        if self._header is None:
            return text
        self._header = (self._header + text)[:_MAX_HEADER]
        return ""

    def flush(self) -> str:
        """End the answer and drop an incomplete last character. Returns: an empty text."""
        return self._plain.flush()

    def _think(self, thinking: bool) -> str:
        """Begin or end a thought. Returns: the mark that shows it; empty if nothing changes."""
        if thinking == self._thinking:
            return ""
        self._thinking = thinking
        return (_THINK if thinking else _END_THINK).decode()


def joined(tokens: Iterable[bytes]) -> tuple[bytes, "array[int]"]:
    """Join the bytes of tokens. Returns: all bytes, and where each token's bytes end."""
    ends, parts, end = array(IDS), [], 0
    for token in tokens:
        end += len(token)
        ends.append(end)
        parts.append(token)
    return b"".join(parts), ends
