"""Finds control tokens that are spelt out in a text, and keeps those that a client writes from becoming tokens."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshd.errors import InvalidRequest, ModelFileError

_MARKS = tuple(chr(code) for code in range(0xA500, 0xA60C))
"""Letters of the Vai script: printable and without case, so that templates pass them on as they are, in Python's `repr` too."""
_MAX_DEPTH = 64
MAX_CHARACTERS = 256
"""Of a control token: each length that one has is tried wherever one may begin."""
_SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's property White_Space, which the tokenizers library goes by."""


@dataclass(frozen=True, slots=True)
class ControlTokenMatch:
    """A token in a text, with the white space that it swallows."""

    token: str
    start: int
    end: int


class ControlTokens:
    """Some tokens, found in texts: the longest at each place, none inside another. A vocabulary may have thousands."""

    def __init__(self, tokens: Collection[str], *, takes_left: Collection[str] = (), takes_right: Collection[str] = ()) -> None:
        """The last two: those that swallow the white space before and after them. Raises: ModelFileError."""
        self._tokens = frozenset(tokens)
        self._takes_left = frozenset(takes_left)
        self._takes_right = frozenset(takes_right)
        if (longest := max(map(len, self._tokens), default=0)) > MAX_CHARACTERS:
            raise ModelFileError(f"the tokenizer can't be used: a control token has {longest} characters, over {MAX_CHARACTERS}")
        lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else r"(?!)")

    def find(self, text: str) -> Iterator[ControlTokenMatch]:
        """From left to right."""
        done, position = 0, 0
        while first := self._first.search(text, position):
            position = first.start()
            token = self._at(text, position)
            if token is None:
                position += 1
                continue
            start, position = position, position + len(token)
            if token in self._takes_left:
                start = done + len(text[done:start].rstrip(_SPACES))
            if token in self._takes_right:
                position = len(text) - len(text[position:].lstrip(_SPACES))
            done = position
            yield ControlTokenMatch(token, start, position)

    def _at(self, text: str, position: int) -> str | None:
        spelt = (text[position : position + length] for length in self._lengths[text[position]])
        return next((candidate for candidate in spelt if candidate in self._tokens), None)

    def broken(self, given: Any, mark: str) -> Any:
        """Texts, lists and dicts as they are, but with `mark` after the first character of each of these tokens' spellings."""
        if isinstance(given, str):
            parts, position = [], 0
            for found in self.find(given):
                at = given.index(found.token, found.start) + 1
                parts += [given[position:at], mark]
                position = at
            return "".join((*parts, given[position:]))
        if isinstance(given, Mapping):
            return {self.broken(key, mark): self.broken(value, mark) for key, value in given.items()}
        return [self.broken(item, mark) for item in given] if isinstance(given, list | tuple) else given


def unused_mark(given: Any) -> str:
    """A character that is in no text of messages, tools and the like. Raises: InvalidRequest."""
    texts = list(_texts(given, _MAX_DEPTH))
    used = set().union(*texts)
    unused = (mark for mark in _MARKS if mark not in used and not any(_escaped(mark) in text for text in texts))
    if (mark := next(unused, None)) is None:
        raise InvalidRequest("the messages can't be encoded: they use every letter of the Vai script", param="messages")
    return mark


def without(text: str, mark: str) -> str:
    """The text before it was marked; a template may have made it ASCII since."""
    return text.replace(mark, "").replace(_escaped(mark), "") if mark else text


def _escaped(mark: str) -> str:
    """As JSON has it in ASCII."""
    return f"\\u{ord(mark):04x}"


def _texts(given: Any, depth: int) -> Iterator[str]:
    if isinstance(given, str):
        yield given
        return
    if not isinstance(given, Mapping | list | tuple):
        return
    if not depth:
        raise InvalidRequest(f"the messages can't be encoded: they are nested more than {_MAX_DEPTH} deep", param="messages")
    for item in (*given.keys(), *given.values()) if isinstance(given, Mapping) else given:
        yield from _texts(item, depth - 1)
