"""Render the answers of `/v1/completions`."""

from collections.abc import Sequence
from typing import Any, ClassVar

from msgspec import UnsetType

from meshd.agents.service import TokenText
from meshd.api.openai.chunks import ChunkRenderer, ChunkWriter
from meshd.api.openai.common_objects import CollectedAnswer, FinishName, Usage, clamp_logprob
from meshd.api.openai.completions.schemas import Completion, CompletionChoice, CompletionLogprobs
from meshd.api.openai.renderers import StreamedEvent


class CompletionRenderer(ChunkRenderer, frozen=True, kw_only=True, tag="completion"):
    """Renderer of the answers to one request for text completions, with the options of the request."""

    logprobs: int | None
    echoes: tuple[str, ...]
    """For each prompt, the text that its answers begin with: the prompt, or nothing if `echo` is not requested."""

    prefix: ClassVar[str] = "cmpl-"
    object_name: ClassVar[str] = "text_completion"

    def echo(self, index: int) -> str:
        """Return the text that answer `index` begins with."""
        return self.echoes[index // self.per_prompt]

    def writer(self, answer_id: str, *, prompt_end: str = "") -> "CompletionWriter":
        """Return a writer for one stream of the answers."""
        return CompletionWriter(self, answer_id)

    def whole(self, answer_id: str, answers: Sequence[CollectedAnswer], usage: Usage, *, prompt_end: str = "") -> Completion:
        """Make the object with all complete answers."""
        choices = [
            CompletionChoice(
                index=index,
                text=self.echo(index) + "".join(answer.text),
                logprobs=_Logprobs(self.logprobs).next(answer.tokens),
                finish_reason=answer.finish,
            )
            for index, answer in enumerate(answers)
        ]
        return Completion(**self.head(answer_id), choices=choices, usage=usage)


class CompletionWriter(ChunkWriter):
    """Writes the chunks of text completions. The first chunks repeat the prompts if `echo` is requested."""

    def __init__(self, renderer: CompletionRenderer, answer_id: str) -> None:
        super().__init__(renderer, answer_id)
        self._renderer = renderer
        self._logprobs = [_Logprobs(renderer.logprobs) for _ in range(renderer.answers)]

    def begin(self) -> list[StreamedEvent]:
        """See `EventWriter.begin`."""
        echoes = ((index, self._renderer.echo(index)) for index in range(self._renderer.answers))
        return [self.delta(index, echo, ()) for index, echo in echoes if echo]

    def delta(self, index: int, text: str, tokens: Sequence[TokenText]) -> StreamedEvent:
        """See `ChunkWriter.delta`."""
        logprobs = self._logprobs[index].next(tokens) if tokens else None
        return self.event(CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None))

    def last(self, index: int, finish: FinishName) -> StreamedEvent:
        """See `ChunkWriter.last`."""
        return self.event(CompletionChoice(index=index, text="", logprobs=None, finish_reason=finish))

    def chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> Completion:
        """See `ChunkWriter.chunk`."""
        return Completion(**self._head, choices=choices, usage=usage)


class _Logprobs:
    """Converts the tokens of one answer to this route's logprobs, and counts characters for the offsets of tokens."""

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._offset = 0

    def next(self, tokens: Sequence[TokenText]) -> CompletionLogprobs | None:
        """Return the logprobs of the answer's next tokens. None: the request does not ask for logprobs."""
        if self._count is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.token)
        return CompletionLogprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[clamp_logprob(token.logprob) for token in tokens],
            top_logprobs=[_top(token) for token in tokens] if self._count else None,
            text_offset=offsets,
        )


def _top(token: TokenText) -> dict[str, float]:
    top: dict[str, float] = {}
    for one in (*token.top, token):
        top.setdefault(one.token, clamp_logprob(one.logprob))
    return top
