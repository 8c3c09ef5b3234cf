"""Turns tokens into text that cannot change any more: whole characters, and no beginning of a stop string. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshd.agents.service import TextDelta, TokenText
from meshd.types import TokenLogprobs


class StreamDecoder(Protocol):
    """Decodes one answer's tokens in order. Implemented in `meshd.models.text.token_table`."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class TokenBytes(Protocol):
    def token_bytes(self, token: int) -> bytes: ...


@dataclass(slots=True)
class StopMatcher:
    """Finds stop strings in streamed text, and withholds text that may begin one. Do not call `push` after a match."""

    stops: tuple[str, ...]
    withheld: str = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns: (text that cannot begin a stop string, whether a stop string was found). The stop string itself is never returned.
        """
        text = self.withheld + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.withheld = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.withheld = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Returns: the withheld text, which did not become a stop string."""
        text, self.withheld = self.withheld, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns: length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(slots=True)
class Assembler:
    """Turns tokens into deltas. A token whose text is still withheld is listed in the delta that contains its text."""

    decoder: StreamDecoder
    vocabulary: TokenBytes
    stops: StopMatcher
    with_logprobs: bool
    stopped: bool = False
    _waiting: list[TokenText] = field(default_factory=list)

    def push(self, token: int, logprobs: TokenLogprobs | None, *, end_of_sequence: bool) -> TextDelta | None:
        """Add the next token, and set `stopped` if the text now contains a stop string.

        Returns: the text that is certain now; None if there is none.
        """
        if self.with_logprobs and logprobs is not None and not end_of_sequence:
            self._waiting.append(token_text(self.vocabulary, token, logprobs))
        text, self.stopped = self.stops.push("" if end_of_sequence else self.decoder.push(token))
        return self._delta(text)

    def finish(self) -> TextDelta | None:
        """Returns: the withheld text, after the last token; None if there is none."""
        if self.stopped:
            return self._delta("")
        text, self.stopped = self.stops.push(self.decoder.flush())
        if not self.stopped:
            text += self.stops.flush()
        return self._delta(text, final=True)

    def _delta(self, text: str, *, final: bool = False) -> TextDelta | None:
        if not text and not (final and self._waiting) and not self.stopped:
            return None
        tokens, self._waiting = tuple(self._waiting), []
        return TextDelta(text=text, tokens=tokens) if text or tokens else None


def token_text(vocabulary: TokenBytes, token: int, logprobs: TokenLogprobs) -> TokenText:
    """Returns: a token with its alternatives, in the form of OpenAI's `logprobs`."""
    top = tuple(_with_text(vocabulary, other, logprob, ()) for other, logprob in logprobs.top)
    return _with_text(vocabulary, token, logprobs.chosen, top)


def _with_text(vocabulary: TokenBytes, token: int, logprob: float, top: Sequence[TokenText]) -> TokenText:
    raw = vocabulary.token_bytes(token)
    return TokenText(token=raw.decode("utf-8", errors="replace"), token_id=token, logprob=logprob, bytes=tuple(raw), top=tuple(top))
