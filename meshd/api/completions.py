"""`POST /v1/completions`."""

from aiohttp import web

from meshd.api.body import read_body
from meshd.api.completion_form import CompletionForm
from meshd.api.completion_shapes import CompletionRequest
from meshd.api.forms import model_fields
from meshd.api.services import SERVICES
from meshd.api.showing import answer


async def create(request: web.Request) -> web.StreamResponse:
    """Continue a prompt or several, whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, CompletionRequest)
    wanted = body.wanted(services.clock)
    form = CompletionForm(
        **model_fields(services, body.model),
        answers=len(wanted),
        per_prompt=body.count,
        logprobs=body.logprobs,
        include_usage=body.include_usage,
        echoes=tuple(body.echoes()),
    )
    return await answer(request, form, wanted, stream=bool(body.stream))
