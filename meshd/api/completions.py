"""`POST /v1/completions`."""

from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET

from meshd.agents.service import Finished, GenerationRequest, TextDelta, TokenText
from meshd.api.answers import FinishName, Tally, answers, collect, finish_name, head, shown
from meshd.api.body import read_body
from meshd.api.completion_shapes import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from meshd.api.reply import json_response
from meshd.api.services import SERVICES
from meshd.api.sse import EventStream, respond


async def create(request: web.Request) -> web.StreamResponse:
    """Continue a prompt or several, whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, CompletionRequest)
    wanted = body.wanted(services.clock)

    async def produce(stream: EventStream) -> None:
        await _stream(request, body, wanted, stream)

    if body.stream:
        return await respond(request, produce)
    tally = Tally(body.count)
    async with services.work.interruptible(), answers(request, wanted) as events:
        whole = await collect(events, len(wanted), tally)
    echoes = body.echoes()
    choices = [
        CompletionChoice(
            index=index,
            text=echoes[index // body.count] + "".join(answer.text),
            logprobs=_Logprobs(body.logprobs).next(answer.tokens),
            finish_reason=answer.finish,
        )
        for index, answer in enumerate(whole)
    ]
    return json_response(Completion(**head(services, "cmpl", body.model), choices=choices, usage=tally.usage()))


async def _stream(
    request: web.Request, body: CompletionRequest, wanted: Sequence[GenerationRequest], stream: EventStream
) -> None:
    """The echo of each prompt if asked for, then pieces as they come, each answer's end, and the usage if asked for."""
    no_usage = None if body.include_usage else UNSET
    tally = Tally(body.count)
    logprobs = [_Logprobs(body.logprobs) for _ in wanted]
    echoes = body.echoes()
    async with answers(request, wanted) as events:
        common = head(request.app[SERVICES], "cmpl", body.model)

        async def piece(index: int, text: str, tokens: Sequence[TokenText] = (), finish: FinishName | None = None) -> None:
            shown_logprobs = logprobs[index].next(tokens) if tokens else None
            choice = CompletionChoice(index=index, text=text, logprobs=shown_logprobs, finish_reason=finish)
            await stream.send(Completion(**common, choices=[choice], usage=no_usage))

        await stream.open()
        if body.echo:
            for index in range(len(wanted)):
                await piece(index, echoes[index // body.count])
        async for index, event in events:
            match event:
                case TextDelta(text=text, tokens=tokens) if text or tokens:
                    await piece(index, text, tokens)
                case Finished():
                    tally.add(index, event)
                    await piece(index, "", finish=finish_name(event))
    if body.include_usage:
        await stream.send(Completion(**common, choices=[], usage=tally.usage()))


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
