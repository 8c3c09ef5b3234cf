"""`POST /v1/chat/completions`."""

from aiohttp import web

from meshd.api.http.body import read_body
from meshd.api.http.services import SERVICES
from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.renderers import model_fields, sampling_defaults
from meshd.api.openai.respond import answer


async def create(request: web.Request) -> web.StreamResponse:
    """Answer a chat. The answers are sent whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, ChatRequest)
    generation_requests = body.generation_requests(services.clock, sampling_defaults(services, body.model))
    renderer = ChatRenderer(
        **model_fields(services, body.model),
        store=body.store is not False,
        answers=len(generation_requests),
        per_prompt=body.count,
        logprobs=bool(body.logprobs),
        include_usage=body.include_usage,
    )
    return await answer(request, renderer, generation_requests, stream=bool(body.stream))
