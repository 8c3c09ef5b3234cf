"""`GET /v1/models` and `GET /v1/models/{id}`: the models that a request would be answered with."""

from typing import Literal

import msgspec
from aiohttp import web

from meshd.agents.service import AvailableModel
from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.errors import UnknownModel
from meshd.types import SamplingDefaults


class ModelDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What meshd adds to OpenAI's fields."""

    loaded: bool
    """Whether the model can answer now. If not, it is loaded for the first request, which waits for that."""
    context_length: int
    quantisation: str
    sampling: SamplingDefaults
    """The parameters that are used where a request says nothing, as the model's authors recommend them."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a request would be answered with."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "meshd"
    meshd: ModelDetails


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that a request would be answered with."""

    object: Literal["list"] = "list"
    data: list[Model]


async def listing(request: web.Request) -> web.Response:
    """Send all models that a request would be answered with."""
    return json_response(ModelList(data=[_model(model) for model in await _available(request)]))


async def one(request: web.Request) -> web.Response:
    """Send one model, found by its name, reference or id. Raises: UnknownModel."""
    name = request.match_info["id"]
    models = await _available(request)
    found = next((model for model in models if name in (model.card.name, model.card.ref, model.card.id)), None)
    if found is None:
        known = ", ".join(model.card.name for model in models) or "none"
        raise UnknownModel(f"no model {name!r} can answer", hint=f"those that can: {known}")
    return json_response(_model(found))


async def _available(request: web.Request) -> list[AvailableModel]:
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return await services.coordinator.models()


def _model(model: AvailableModel) -> Model:
    card = model.card
    details = ModelDetails(
        loaded=model.loaded, context_length=card.spec.context_length, quantisation=card.quantisation, sampling=card.sampling
    )
    return Model(id=card.name, created=card.created, meshd=details)
