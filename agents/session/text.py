"""From tokens to text that is certain: whole characters, stop strings found across token borders. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshd.agents.service import TextDelta, TokenText
from meshd.types import TokenLogprobs


class StreamDecoder(Protocol):
    """`meshd.models.text.tokenizer.tokenizer` has it."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class TokenBytes(Protocol):
    def token_bytes(self, token: int) -> bytes: ...


@dataclass(slots=True)
class StopMatcher:
    """Holds back what may be the beginning of a stop string. `push` after a match is an error of the caller's."""

    stops: tuple[str, ...]
    withheld: str = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was reached). The stop string itself is never given out."""
        text = self.withheld + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.withheld = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.withheld = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and turned out not to be a stop string."""
        text, self.withheld = self.withheld, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(slots=True)
class Assembler:
    """Tokens in, deltas out; remembers the tokens whose text is still held back."""

    decoder: StreamDecoder
    vocabulary: TokenBytes
    stops: StopMatcher
    with_logprobs: bool
    stopped: bool = False
    _waiting: list[TokenText] = field(default_factory=list)

    def push(self, token: int, logprobs: TokenLogprobs | None, *, end_of_sequence: bool) -> TextDelta | None:
        """The next token. None: nothing is certain yet. `stopped` tells whether a stop string was reached."""
        if self.with_logprobs and logprobs is not None and not end_of_sequence:
            self._waiting.append(token_text(self.vocabulary, token, logprobs))
        text, self.stopped = self.stops.push("" if end_of_sequence else self.decoder.push(token))
        return self._delta(text)

    def finish(self) -> TextDelta | None:
        """After the last token: what was held back."""
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
    """A token with its alternatives, as OpenAI's `logprobs` show them."""
    top = tuple(_one(vocabulary, other, logprob, ()) for other, logprob in logprobs.top)
    return _one(vocabulary, token, logprobs.chosen, top)


def _one(vocabulary: TokenBytes, token: int, logprob: float, top: Sequence[TokenText]) -> TokenText:
    raw = vocabulary.token_bytes(token)
    return TokenText(token=raw.decode("utf-8", errors="replace"), token_id=token, logprob=logprob, bytes=tuple(raw), top=tuple(top))
