"""How `/v1/completions` shows its answers."""

from collections.abc import Sequence
from typing import Any, ClassVar

from msgspec import UnsetType

from meshd.agents.service import TokenText
from meshd.api.openai.chunks import ChunkRenderer, ChunkWriter
from meshd.api.openai.completions.schemas import Completion, CompletionChoice, CompletionLogprobs
from meshd.api.openai.parts import CollectedAnswer, FinishName, Usage, shown
from meshd.api.openai.renderers import StreamedEvent


class CompletionRenderer(ChunkRenderer, frozen=True, kw_only=True, tag="completion"):
    """What a completion asked to be shown."""

    logprobs: int | None
    echoes: tuple[str, ...]
    """What each prompt's answers begin with."""

    prefix: ClassVar[str] = "cmpl-"
    object_name: ClassVar[str] = "text_completion"

    def echo(self, index: int) -> str:
        """What answer `index` begins with."""
        return self.echoes[index // self.per_prompt]

    def writer(self, answer_id: str) -> "CompletionWriter":
        """For a stream."""
        return CompletionWriter(self, answer_id)

    def whole(self, answer_id: str, answers: Sequence[CollectedAnswer], usage: Usage) -> Completion:
        """All answers in one object."""
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
    """Begins with the echo of each prompt, if asked for."""

    def __init__(self, form: CompletionRenderer, answer_id: str) -> None:
        super().__init__(form, answer_id)
        self._form = form
        self._logprobs = [_Logprobs(form.logprobs) for _ in range(form.answers)]

    def begin(self) -> list[StreamedEvent]:
        """See `Writer.begin`."""
        echoes = ((index, self._form.echo(index)) for index in range(self._form.answers))
        return [self.piece(index, echo, ()) for index, echo in echoes if echo]

    def piece(self, index: int, text: str, tokens: Sequence[TokenText]) -> StreamedEvent:
        """See `ChunkWriter.piece`."""
        logprobs = self._logprobs[index].next(tokens) if tokens else None
        return self.event(CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None))

    def last(self, index: int, finish: FinishName) -> StreamedEvent:
        """See `ChunkWriter.last`."""
        return self.event(CompletionChoice(index=index, text="", logprobs=None, finish_reason=finish))

    def chunk(self, choices: list[Any], usage: Usage | UnsetType | None) -> Completion:
        """See `ChunkWriter.chunk`."""
        return Completion(**self._head, choices=choices, usage=usage)


class _Logprobs:
    """Shows one answer's tokens in this route's shape, piece by piece, counting characters."""

    def __init__(self, asked: int | None) -> None:
        self._asked = asked
        self._offset = 0

    def next(self, tokens: Sequence[TokenText]) -> CompletionLogprobs | None:
        """Of the answer's next tokens; None if not asked for."""
        if self._asked is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.token)
        return CompletionLogprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[shown(token.logprob) for token in tokens],
            top_logprobs=[_top(token) for token in tokens] if self._asked else None,
            text_offset=offsets,
        )


def _top(token: TokenText) -> dict[str, float]:
    top: dict[str, float] = {}
    for one in (*token.top, token):
        top.setdefault(one.token, shown(one.logprob))
    return top
