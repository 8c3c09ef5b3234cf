"""The code that chats and text completions share: the streams of both consist of chunks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from meshd.agents.service import Finished, TextDelta, TokenText
from meshd.api.http.errors import HttpProblem
from meshd.api.openai.common_objects import FinishName, Usage, UsageCounter, finish_name
from meshd.api.openai.renderers import Renderer, StreamedEvent, error_event


class ChunkRenderer(Renderer, frozen=True, kw_only=True):
    """A renderer whose streams consist of chunks."""

    include_usage: bool
    """Whether the stream ends with a chunk that has the usage and no choices. The usage of the other chunks is then null."""


class ChunkWriter(ABC):
    """Writes one chunk for each delta, one for the end of each answer, and one for the usage if it is requested."""

    def __init__(self, renderer: ChunkRenderer, answer_id: str) -> None:
        self._answers = renderer.answers
        self._include_usage = renderer.include_usage
        self._head = renderer.head(answer_id)
        self._numbers = renderer.numbers()
        self._counter = UsageCounter(renderer.per_prompt)

    @abstractmethod
    def begin(self) -> list[StreamedEvent]:
        """See `EventWriter.begin`."""

    @abstractmethod
    def delta(self, index: int, text: str, tokens: Sequence[TokenText]) -> StreamedEvent:
        """Make the chunk for a delta of answer `index`."""

    @abstractmethod
    def last(self, index: int, finish: FinishName) -> StreamedEvent:
        """Make the chunk that ends answer `index`."""

    @abstractmethod
    def chunk(self, choices: list[object], usage: Usage | UnsetType | None) -> object:
        """Make the body of an event. `usage`: UNSET leaves the field out."""

    def take(self, index: int, item: TextDelta | Finished) -> list[StreamedEvent]:
        """See `EventWriter.take`."""
        match item:
            case Finished():
                finish = finish_name(item)
                self._counter.add(index, item)
                return [self.last(index, finish), *self._usage()]
            case TextDelta(text=text, tokens=tokens) if text or tokens:
                return [self.delta(index, text, tokens)]
        return []

    def fail(self, failure: HttpProblem, last: int, *, for_good: bool) -> StreamedEvent:
        """See `EventWriter.fail`."""
        return error_event(failure)

    def event(self, choice: object) -> StreamedEvent:
        """Make the stream's next event, which has one choice."""
        return StreamedEvent(self.chunk([choice], None if self._include_usage else UNSET), next(self._numbers))

    def _usage(self) -> list[StreamedEvent]:
        if not self._include_usage or self._counter.ended < self._answers:
            return []
        return [StreamedEvent(self.chunk([], self._counter.usage()), next(self._numbers))]
