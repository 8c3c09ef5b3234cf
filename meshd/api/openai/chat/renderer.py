"""Render the answers of `/v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from msgspec import UNSET, UnsetType

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
from meshd.api.openai.common_objects import CollectedAnswer, FinishName, Usage, token_logprobs
from meshd.api.openai.renderers import StreamedEvent
from meshd.api.openai.thoughts import Split, ThoughtSplitter, opens_thought, split


class ChatRenderer(ChunkRenderer, frozen=True, kw_only=True, tag="chat"):
    """Renderer of the answers to one chat request, with the options of the request."""

    logprobs: bool

    prefix: ClassVar[str] = "chatcmpl-"
    object_name: ClassVar[str] = "chat.completion"

    def writer(self, answer_id: str, *, prompt_end: str = "") -> "ChatWriter":
        """Return a writer for one stream of the answers."""
        return ChatWriter(self, answer_id, thinking=opens_thought(prompt_end))

    def whole(self, answer_id: str, answers: Sequence[CollectedAnswer], usage: Usage, *, prompt_end: str = "") -> ChatCompletion:
        """Make the object with all complete answers."""
        thinking = opens_thought(prompt_end)
        choices = [
            ChatChoice(
                index=index,
                message=_message(split("".join(answer.text), thinking=thinking)),
                logprobs=self.chat_logprobs(answer.tokens),
                finish_reason=answer.finish,
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(**self.head(answer_id), choices=choices, usage=usage)

    def chat_logprobs(self, tokens: Sequence[TokenText]) -> ChatLogprobs | None:
        """Return the logprobs of tokens. None: the request does not ask for logprobs."""
        return ChatLogprobs(content=token_logprobs(tokens)) if self.logprobs else None


class ChatWriter(ChunkWriter):
    """Writes the chunks of a chat. Each answer begins with a chunk that has the role and no text."""

    def __init__(self, renderer: ChatRenderer, answer_id: str, *, thinking: bool) -> None:
        super().__init__(renderer, answer_id)
        self._renderer = renderer
        self._splitters = [ThoughtSplitter(thinking=thinking) for _ in range(renderer.answers)]

    def begin(self) -> list[StreamedEvent]:
        """See `EventWriter.begin`."""
        role = Delta(role="assistant", content="", refusal=None)
        return [self.event(ChunkChoice(index=index, delta=role)) for index in range(self._renderer.answers)]

    def delta(self, index: int, text: str, tokens: Sequence[TokenText]) -> StreamedEvent:
        """See `ChunkWriter.delta`."""
        return self._piece(index, self._splitters[index].push(text), self._renderer.chat_logprobs(tokens))

    def last(self, index: int, finish: FinishName) -> StreamedEvent:
        """See `ChunkWriter.last`."""
        return self._piece(index, self._splitters[index].flush(), None, finish)

    def _piece(self, index: int, piece: Split, logprobs: ChatLogprobs | None, finish: FinishName | None = None) -> StreamedEvent:
        thought = piece.thought or UNSET
        # Clients expect text in each chunk before the last, though it may be empty.
        text = piece.text if piece.text or (finish is None and not piece.thought) else UNSET
        delta = Delta(content=text, reasoning_content=thought)
        return self.event(ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish))

    def chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        """See `ChunkWriter.chunk`."""
        return ChatCompletionChunk(**self._head, choices=choices, usage=usage)


def _message(answer: Split) -> AnswerMessage:
    return AnswerMessage(content=answer.text, reasoning_content=answer.thought or UNSET)
