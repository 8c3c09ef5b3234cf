"""`POST /v1/chat/completions`."""

from collections.abc import Sequence

from aiohttp import web
from msgspec import UNSET

from meshd.agents.service import Finished, GenerationRequest, TextDelta, TokenText
from meshd.api.answers import Collected, FinishName, Tally, answers, collect, finish_name, head, shown
from meshd.api.body import read_body
from meshd.api.chat_shapes import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from meshd.api.reply import json_response
from meshd.api.services import SERVICES
from meshd.api.sse import EventStream, respond


async def create(request: web.Request) -> web.StreamResponse:
    """Answer a chat, whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, ChatRequest)
    wanted = body.wanted(services.clock)

    async def produce(stream: EventStream) -> None:
        await _stream(request, body, wanted, stream)

    if body.stream:
        return await respond(request, produce)
    tally = Tally(body.count)
    async with services.work.interruptible(), answers(request, wanted) as events:
        whole = await collect(events, len(wanted), tally)
    choices = [_choice(index, answer, bool(body.logprobs)) for index, answer in enumerate(whole)]
    return json_response(ChatCompletion(**head(services, "chatcmpl", body.model), choices=choices, usage=tally.usage()))


async def _stream(
    request: web.Request, body: ChatRequest, wanted: Sequence[GenerationRequest], stream: EventStream
) -> None:
    """The role of each answer, then pieces as they come, each answer's end, and the usage if asked for."""
    no_usage = None if body.include_usage else UNSET
    tally = Tally(body.count)
    async with answers(request, wanted) as events:
        common = head(request.app[SERVICES], "chatcmpl", body.model)

        async def piece(index: int, delta: Delta, logprobs: ChatLogprobs | None = None, finish: FinishName | None = None) -> None:
            choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
            await stream.send(ChatCompletionChunk(**common, choices=[choice], usage=no_usage))

        for index in range(len(wanted)):
            await piece(index, Delta(role="assistant", content="", refusal=None))
        async for index, event in events:
            match event:
                case TextDelta(text=text, tokens=tokens) if text or tokens:
                    await piece(index, Delta(content=text), _logprobs(tokens) if body.logprobs else None)
                case Finished():
                    tally.add(index, event)
                    await piece(index, Delta(), finish=finish_name(event))
    if body.include_usage:
        await stream.send(ChatCompletionChunk(**common, choices=[], usage=tally.usage()))


def _choice(index: int, answer: Collected, with_logprobs: bool) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AnswerMessage(content="".join(answer.text)),
        logprobs=_logprobs(answer.tokens) if with_logprobs else None,
        finish_reason=answer.finish,
    )


def _logprobs(tokens: Sequence[TokenText]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=one.token,
                logprob=shown(one.logprob),
                bytes=one.bytes,
                top_logprobs=[TopLogprob(token=top.token, logprob=shown(top.logprob), bytes=top.bytes) for top in one.top],
            )
            for one in tokens
        ]
    )
