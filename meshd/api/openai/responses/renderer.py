"""Render the answers of `/v1/responses`."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from meshd.agents.service import Finished, Generation, TextDelta
from meshd.api.http.errors import HttpProblem, ResumableAnswer, problem
from meshd.api.openai.common_objects import CollectedAnswer, Usage, UsageCounter, finish_name, token_logprobs
from meshd.api.openai.renderers import Renderer, StreamedEvent
from meshd.api.openai.responses import schemas as shapes
from meshd.errors import MeshdError
from meshd.types import FinishReason

_ENDS: dict[FinishReason, shapes.ResponseStatus] = {
    FinishReason.STOP: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "failed",
}
_STATUSES: dict[str, shapes.ResponseStatus] = {
    "queued": "queued", "in_progress": "in_progress", "suspended": "in_progress", "completed": "completed",
    "cancelled": "cancelled", "failed": "failed",
}  # fmt: skip


class ResponseRenderer(Renderer, frozen=True, kw_only=True, tag="response"):
    """Renderer of one response, with the fields of the request that the response repeats."""

    asked: shapes.RequestEcho
    logprobs: bool

    prefix: ClassVar[str] = "resp_"
    object_name: ClassVar[str] = "response"
    sends_done: ClassVar[bool] = False

    def writer(self, answer_id: str, *, prompt_end: str = "") -> "ResponseWriter":
        """Return a writer for one stream of the answer."""
        return ResponseWriter(self, answer_id)

    def whole(self, answer_id: str, answers: Sequence[CollectedAnswer], usage: Usage, *, prompt_end: str = "") -> shapes.Response:
        """Make the object of a complete answer."""
        [answer] = answers
        return self.response(answer_id, "completed" if answer.finish == "stop" else "incomplete", answer, usage=usage)

    def snapshot(self, generation: Generation) -> shapes.Response:
        """Make the object of an answer's current state.

        An unfinished answer with an error is shown as failed, even if it is only suspended, so that a polling client gets the
        error. If the answer is suspended, the error says how to resume it.
        """
        deltas, finished = generation.so_far()
        answer, counter = CollectedAnswer(), UsageCounter(1)
        for delta in deltas:
            answer.add(delta)
        error = generation.error
        if finished is not None:
            counter.add(0, finished)
            status = _ENDS[finished.reason]
        else:
            status = "failed" if error is not None else _STATUSES[generation.status]
        return self.response(
            self.prefix + generation.secret,
            status,
            answer if finished or not answer.empty else None,
            usage=counter.usage() if finished else None,
            error=self._error(generation, error) if error is not None and finished is None else None,
        )

    def _error(self, generation: Generation, error: MeshdError) -> shapes.ResponseError:
        resumable = ResumableAnswer(self.prefix + generation.secret, generation)
        return _error_of(problem(error, resume_hint=resumable.resume_hint()))

    def response(
        self,
        answer_id: str,
        status: shapes.ResponseStatus,
        answer: CollectedAnswer | None = None,
        *,
        usage: Usage | None = None,
        error: shapes.ResponseError | None = None,
    ) -> shapes.Response:
        """Make the object of an answer with this status. `answer`: None leaves the output empty."""
        asked: dict[str, Any] = {name: getattr(self.asked, name) for name in self.asked.__struct_fields__}
        return shapes.Response(
            **asked,
            id=answer_id,
            created_at=self.created,
            status=status,
            background=self.background,
            error=error,
            incomplete_details=shapes.IncompleteDetails() if status == "incomplete" else None,
            model=self.model,
            output=[self.message(answer_id, status, answer)] if answer is not None else [],
            usage=shapes.ResponseUsage.of(usage) if usage is not None else None,
            store=self.store,
        )

    def message(self, answer_id: str, status: shapes.ResponseStatus, answer: CollectedAnswer) -> shapes.OutputMessage:
        """Make the only message of the output."""
        message_status: Literal["in_progress", "completed", "incomplete"]
        message_status = (
            "completed" if status == "completed" else "in_progress" if status in ("queued", "in_progress") else "incomplete"
        )
        return shapes.OutputMessage(id=self.item_id(answer_id), status=message_status, content=[self.text(answer)])

    def text(self, answer: CollectedAnswer) -> shapes.OutputText:
        """Make the only content part of the message."""
        return shapes.OutputText(text="".join(answer.text), logprobs=token_logprobs(answer.tokens) if self.logprobs else [])

    def item_id(self, answer_id: str) -> str:
        """Return the id of the only message."""
        return f"msg_{answer_id.removeprefix(self.prefix)}"


class ResponseWriter:
    """Writes the events of a response: two with the new object, the growing message, the complete message, the final object."""

    def __init__(self, renderer: ResponseRenderer, answer_id: str) -> None:
        self._renderer = renderer
        self._id = answer_id
        self._content = {"item_id": renderer.item_id(answer_id)}
        self._answer = CollectedAnswer()
        self._opened = False
        self._next = 0

    def begin(self) -> list[StreamedEvent]:
        """See `EventWriter.begin`."""
        first = self._renderer.response(self._id, "queued" if self._renderer.background else "in_progress")
        return [
            self._event(shapes.Created, response=first),
            self._event(shapes.InProgress, response=self._renderer.response(self._id, "in_progress")),
        ]

    def take(self, index: int, item: TextDelta | Finished) -> list[StreamedEvent]:
        """See `EventWriter.take`."""
        match item:
            case Finished():
                self._answer.finish = finish_name(item)
                return [*self._open(), *self._close(item)]
            case TextDelta(text=text, tokens=tokens) if text or tokens:
                self._answer.add(item)
                logprobs = token_logprobs(tokens) if self._renderer.logprobs else []
                return [*self._open(), self._event(shapes.OutputTextDelta, **self._content, delta=text, logprobs=logprobs)]
        return []

    def fail(self, failure: HttpProblem, last: int, *, for_good: bool) -> StreamedEvent:
        """See `EventWriter.fail`."""
        if for_good:
            error = _error_of(failure)
            answer = None if self._answer.empty else self._answer
            return self._event(shapes.ResponseFailed, response=self._renderer.response(self._id, "failed", answer, error=error))
        detail = failure.detail
        # The error has the number of the last event that was sent. A client that resumes after this number misses no event.
        error_event = shapes.ErrorEvent(sequence_number=max(last, 0), code=detail.code, message=detail.message, param=detail.param)
        return StreamedEvent(error_event, name="error")

    def _open(self) -> list[StreamedEvent]:
        if self._opened:
            return []
        self._opened = True
        message = shapes.OutputMessage(id=self._content["item_id"], status="in_progress", content=[])
        return [
            self._event(shapes.ItemAdded, item=message),
            self._event(shapes.PartAdded, **self._content, part=shapes.OutputText(text="")),
        ]

    def _close(self, finished: Finished) -> list[StreamedEvent]:
        counter = UsageCounter(1)
        counter.add(0, finished)
        response = self._renderer.whole(self._id, [self._answer], counter.usage())
        [message] = response.output
        [part] = message.content
        kind = shapes.Completed if response.status == "completed" else shapes.Incomplete
        return [
            self._event(shapes.TextDone, **self._content, text=part.text, logprobs=part.logprobs),
            self._event(shapes.PartDone, **self._content, part=part),
            self._event(shapes.ItemDone, item=message),
            self._event(kind, response=response),
        ]

    def _event(self, kind: type[shapes.StreamEvent], **fields: Any) -> StreamedEvent:
        number, self._next = self._next, self._next + 1
        return StreamedEvent(kind(sequence_number=number, **fields), number, str(kind.__struct_config__.tag))


def _error_of(failure: HttpProblem) -> shapes.ResponseError:
    return shapes.ResponseError(message=failure.detail.message, type=failure.detail.code)
