"""`POST /v1/completions`."""

from aiohttp import web

from meshd.api.http.body import read_body
from meshd.api.http.services import SERVICES
from meshd.api.openai.completions.renderer import CompletionRenderer
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.renderers import model_fields, sampling_defaults
from meshd.api.openai.respond import answer


async def create(request: web.Request) -> web.StreamResponse:
    """Continue one or several prompts. The answers are sent whole or as a stream."""
    services = request.app[SERVICES]
    body = await read_body(request, CompletionRequest)
    generation_requests = body.generation_requests(services.clock, sampling_defaults(services, body.model))
    renderer = CompletionRenderer(
        **model_fields(services, body.model),
        answers=len(generation_requests),
        per_prompt=body.count,
        logprobs=body.logprobs,
        include_usage=body.include_usage,
        echoes=tuple(body.echoes()),
    )
    return await answer(request, renderer, generation_requests, stream=bool(body.stream))
