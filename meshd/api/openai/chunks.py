"""Streams of chunks: what chats and text completions have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from meshd.agents.service import Finished, TextDelta, TokenText
from meshd.api.http.errors import HttpProblem
from meshd.api.openai.parts import FinishName, Usage, UsageCounter, finish_name
from meshd.api.openai.renderers import Renderer, StreamedEvent, error_event


class ChunkRenderer(Renderer, frozen=True, kw_only=True):
    """A form of a stream of chunks."""

    include_usage: bool
    """A last chunk with the usage and no choices; the others have a usage of null."""


class ChunkWriter(ABC):
    """Pieces as they come, each answer's end, and the usage if asked for."""

    def __init__(self, form: ChunkRenderer, answer_id: str) -> None:
        self._answers = form.answers
        self._include_usage = form.include_usage
        self._head = form.head(answer_id)
        self._numbers = form.numbers()
        self._tally = UsageCounter(form.per_prompt)

    @abstractmethod
    def begin(self) -> list[StreamedEvent]:
        """See `Writer.begin`."""

    @abstractmethod
    def piece(self, index: int, text: str, tokens: Sequence[TokenText]) -> StreamedEvent:
        """More of answer `index`."""

    @abstractmethod
    def last(self, index: int, finish: FinishName) -> StreamedEvent:
        """Its end."""

    @abstractmethod
    def chunk(self, choices: list[object], usage: Usage | UnsetType | None) -> object:
        """The body of an event."""

    def take(self, index: int, item: TextDelta | Finished) -> list[StreamedEvent]:
        """See `Writer.take`."""
        match item:
            case Finished():
                finish = finish_name(item)
                self._tally.add(index, item)
                return [self.last(index, finish), *self._usage()]
            case TextDelta(text=text, tokens=tokens) if text or tokens:
                return [self.piece(index, text, tokens)]
        return []

    def fail(self, told: HttpProblem, last: int, *, for_good: bool) -> StreamedEvent:
        """See `Writer.fail`."""
        return error_event(told)

    def event(self, choice: object) -> StreamedEvent:
        """The next chunk, of this choice."""
        return StreamedEvent(self.chunk([choice], None if self._include_usage else UNSET), next(self._numbers))

    def _usage(self) -> list[StreamedEvent]:
        if not self._include_usage or self._tally.ended < self._answers:
            return []
        return [StreamedEvent(self.chunk([], self._tally.usage()), next(self._numbers))]
