"""Find control tokens spelt out in a text, and keep a client's messages from smuggling them into a prompt.

`ControlTokens.insert_mark` puts a mark (a character that no message uses) into every control token that the client's messages
spell out. The rendered prompt then has control tokens only where the template wrote them. `remove_mark` removes the mark from the
text between these tokens.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshd.errors import InvalidRequest, ModelFileError

_MARKS = tuple(chr(code) for code in range(0xA500, 0xA60C))
"""Possible marks: letters of the Vai script. They are printable and have no case, so templates and `repr` keep them unchanged."""
_MAX_DEPTH = 64
MAX_CHARACTERS = 256
"""Limit for the length of a control token: `ControlTokens.find` tries each length that a token at a position may have."""
_SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""All characters with Unicode's property White_Space, which the tokenizers library strips."""


@dataclass(frozen=True, slots=True)
class ControlTokenMatch:
    """A control token in a text. `start` and `end` include the white space that the token strips."""

    token: str
    start: int
    end: int


class ControlTokens:
    """Finds tokens in texts: the longest one at each position, without overlaps. A vocabulary may have thousands of them."""

    def __init__(self, tokens: Collection[str], *, strips_left: Collection[str] = (), strips_right: Collection[str] = ()) -> None:
        """`strips_left` and `strips_right` are the tokens that strip the white space before and after them.

        Raises: ModelFileError if a token has more than MAX_CHARACTERS.
        """
        self._tokens = frozenset(tokens)
        self._strips_left = frozenset(strips_left)
        self._strips_right = frozenset(strips_right)
        if (longest := max(map(len, self._tokens), default=0)) > MAX_CHARACTERS:
            raise ModelFileError(f"the tokenizer can't be used: a control token has {longest} characters, over {MAX_CHARACTERS}")
        lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else r"(?!)")

    def find(self, text: str) -> Iterator[ControlTokenMatch]:
        """Yield the tokens in a text from left to right."""
        done, position = 0, 0
        while first := self._first.search(text, position):
            position = first.start()
            token = self._at(text, position)
            if token is None:
                position += 1
                continue
            start, position = position, position + len(token)
            if token in self._strips_left:
                start = done + len(text[done:start].rstrip(_SPACES))
            if token in self._strips_right:
                position = len(text) - len(text[position:].lstrip(_SPACES))
            done = position
            yield ControlTokenMatch(token, start, position)

    def _at(self, text: str, position: int) -> str | None:
        spelt = (text[position : position + length] for length in self._lengths[text[position]])
        return next((candidate for candidate in spelt if candidate in self._tokens), None)

    def insert_mark(self, given: Any, mark: str) -> Any:
        """Copy texts, lists and dicts of any depth, with `mark` after the first character of every token in them."""
        if isinstance(given, str):
            parts, position = [], 0
            for found in self.find(given):
                at = given.index(found.token, found.start) + 1
                parts += [given[position:at], mark]
                position = at
            return "".join((*parts, given[position:]))
        if isinstance(given, Mapping):
            return {self.insert_mark(key, mark): self.insert_mark(value, mark) for key, value in given.items()}
        return [self.insert_mark(item, mark) for item in given] if isinstance(given, list | tuple) else given


def unused_mark(given: Any) -> str:
    """Choose a mark that no text in `given` uses, at any depth.

    Raises: InvalidRequest if every mark is used, or if `given` is nested too deep.
    """
    texts = list(_texts(given, _MAX_DEPTH))
    used = set().union(*texts)
    unused = (mark for mark in _MARKS if mark not in used and not any(_escaped(mark) in text for text in texts))
    if (mark := next(unused, None)) is None:
        raise InvalidRequest("the messages can't be encoded: they use every letter of the Vai script", param="messages")
    return mark


def remove_mark(text: str, mark: str) -> str:
    """Remove the mark from a text, and also its JSON escape, which a template may have written instead."""
    return text.replace(mark, "").replace(_escaped(mark), "") if mark else text


def _escaped(mark: str) -> str:
    """Return the JSON escape of the mark, such as `\\ua500`."""
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
