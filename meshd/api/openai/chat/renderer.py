"""How `/v1/chat/completions` shows its answers."""

from collections.abc import Sequence
from typing import Any, ClassVar

from msgspec import UnsetType

from meshd.agents.service import TokenText
from meshd.api.openai.chat.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Delta,
)
from meshd.api.openai.chunks import ChunkRenderer, ChunkWriter
from meshd.api.openai.parts import CollectedAnswer, FinishName, Usage, shown_tokens
from meshd.api.openai.renderers import StreamedEvent


class ChatRenderer(ChunkRenderer, frozen=True, kw_only=True, tag="chat"):
    """What a chat asked to be shown."""

    logprobs: bool

    prefix: ClassVar[str] = "chatcmpl-"
    object_name: ClassVar[str] = "chat.completion"

    def writer(self, answer_id: str) -> "ChatWriter":
        """For a stream."""
        return ChatWriter(self, answer_id)

    def whole(self, answer_id: str, answers: Sequence[CollectedAnswer], usage: Usage) -> ChatCompletion:
        """All answers in one object."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content="".join(answer.text)),
                logprobs=self.shown_logprobs(answer.tokens),
                finish_reason=answer.finish,
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(**self.head(answer_id), choices=choices, usage=usage)

    def shown_logprobs(self, tokens: Sequence[TokenText]) -> ChatLogprobs | None:
        """None if not asked for."""
        return ChatLogprobs(content=shown_tokens(tokens)) if self.logprobs else None


class ChatWriter(ChunkWriter):
    """Begins with the role of each answer."""

    def __init__(self, form: ChatRenderer, answer_id: str) -> None:
        super().__init__(form, answer_id)
        self._form = form

    def begin(self) -> list[StreamedEvent]:
        """See `Writer.begin`."""
        role = Delta(role="assistant", content="", refusal=None)
        return [self.event(ChunkChoice(index=index, delta=role)) for index in range(self._form.answers)]

    def piece(self, index: int, text: str, tokens: Sequence[TokenText]) -> StreamedEvent:
        """See `ChunkWriter.piece`."""
        return self.event(ChunkChoice(index=index, delta=Delta(content=text), logprobs=self._form.shown_logprobs(tokens)))

    def last(self, index: int, finish: FinishName) -> StreamedEvent:
        """See `ChunkWriter.last`."""
        return self.event(ChunkChoice(index=index, delta=Delta(), finish_reason=finish))

    def chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        """See `ChunkWriter.chunk`."""
        return ChatCompletionChunk(**self._head, choices=choices, usage=usage)
