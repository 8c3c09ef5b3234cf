"""`POST /v1/chat/completions`."""

from aiohttp import web

from meshd.api.http.body import read_body
from meshd.api.http.services import SERVICES
from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.renderers import model_fields
from meshd.api.openai.showing import answer


async def create(request: web.Request) -> web.StreamResponse:
    """Answer a chat, whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, ChatRequest)
    wanted = body.wanted(services.clock)
    form = ChatRenderer(
        **model_fields(services, body.model),
        store=body.store is not False,
        answers=len(wanted),
        per_prompt=body.count,
        logprobs=bool(body.logprobs),
        include_usage=body.include_usage,
    )
    return await answer(request, form, wanted, stream=bool(body.stream))
