"""`POST /v1/chat/completions`."""

from aiohttp import web

from meshd.api.body import read_body
from meshd.api.chat_form import ChatForm
from meshd.api.chat_shapes import ChatRequest
from meshd.api.forms import model_fields
from meshd.api.services import SERVICES
from meshd.api.showing import answer


async def create(request: web.Request) -> web.StreamResponse:
    """Answer a chat, whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, ChatRequest)
    wanted = body.wanted(services.clock)
    form = ChatForm(
        **model_fields(services, body.model),
        store=body.store is not False,
        answers=len(wanted),
        per_prompt=body.count,
        logprobs=bool(body.logprobs),
        include_usage=body.include_usage,
    )
    return await answer(request, form, wanted, stream=bool(body.stream))
