"""Separates what a model thinks from what it answers. Pure.

Models that think before they answer write `<think>...</think>` first, in these words or in tokens that are shown as such. The
template of some models ends with `<think>`, so that the answer begins inside the thought.
"""

from dataclasses import dataclass
from enum import Enum

_BEGIN, _END = "<think>", "</think>"


class _State(Enum):
    BEFORE = "before"
    """Only white space so far, or a thought has just ended: another thought may begin."""
    THINKING = "thinking"
    ANSWERING = "answering"
    """No thought begins any more: a later mark is text like any other."""


@dataclass(frozen=True, slots=True)
class Split:
    """A piece of an answer: its part of the thought, and its part of the text that follows."""

    thought: str = ""
    text: str = ""


class ThoughtSplitter:
    """Splits one answer as it grows. White space around a thought belongs to neither part."""

    def __init__(self, *, thinking: bool = False) -> None:
        """`thinking`: the prompt ends with the beginning of a thought."""
        self._state = _State.THINKING if thinking else _State.BEFORE
        self._withheld = ""
        self._strips = thinking
        """Whether white space before the next character is dropped: after each mark."""

    def push(self, text: str) -> Split:
        """Add text. Returns: what is certain now; text that may be a mark or the end of a thought is withheld."""
        self._withheld += text
        thought, answer = [], []
        while True:
            state = self._state
            match state:
                case _State.BEFORE:
                    answer.append(self._before())
                case _State.THINKING:
                    thought.append(self._thinking())
                case _State.ANSWERING:
                    answer.append(self._withheld)
                    self._withheld = ""
            if self._state is state:
                return Split("".join(thought), "".join(answer))

    def flush(self) -> Split:
        """Return what is withheld, after the end of the answer."""
        rest, self._withheld = self._withheld, ""
        if self._state is _State.THINKING:
            return Split(thought=self._stripped(rest).rstrip())
        return Split(text=rest.lstrip() if self._strips else rest)

    def _before(self) -> str:
        text = self._withheld.lstrip()
        if text.startswith(_BEGIN):
            self._state, self._strips = _State.THINKING, True
            self._withheld = text[len(_BEGIN) :]
        elif not _BEGIN.startswith(text):
            self._state = _State.ANSWERING
            answer, self._withheld = text if self._strips else self._withheld, ""
            return answer
        return ""

    def _thinking(self) -> str:
        thought, end, rest = self._stripped(self._withheld).partition(_END)
        if end:
            self._state, self._strips, self._withheld = _State.BEFORE, True, rest
            return thought.rstrip()
        certain = thought[: len(thought) - _overlap(thought)].rstrip()
        self._withheld = thought[len(certain) :]
        return certain

    def _stripped(self, text: str) -> str:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text


def split(text: str, *, thinking: bool) -> Split:
    """Split a whole answer."""
    splitter = ThoughtSplitter(thinking=thinking)
    first, last = splitter.push(text), splitter.flush()
    return Split(first.thought + last.thought, first.text + last.text)


def opens_thought(prompt: str) -> bool:
    """Whether an answer to this prompt begins inside a thought."""
    return prompt.rstrip().endswith(_BEGIN)


def _overlap(text: str) -> int:
    """Return the length of the longest end of `text` that begins the mark of a thought's end."""
    return next((length for length in range(min(len(text), len(_END) - 1), 0, -1) if text.endswith(_END[:length])), 0)
