"""`GET /v1/models` and `GET /v1/models/{id}`: the models that can answer now."""

from typing import Literal

import msgspec
from aiohttp import web

from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.errors import UnknownModel
from meshd.types import ModelCard


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can answer now."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "meshd"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that can answer now."""

    object: Literal["list"] = "list"
    data: list[Model]


async def listing(request: web.Request) -> web.Response:
    """Send all models that can answer now."""
    return json_response(ModelList(data=[_model(card) for card in request.app[SERVICES].coordinator.models()]))


async def one(request: web.Request) -> web.Response:
    """Send one model, found by its name or id. Raises: UnknownModel."""
    name = request.match_info["id"]
    cards = request.app[SERVICES].coordinator.models()
    card = next((card for card in cards if name in (card.name, card.id)), None)
    if card is None:
        known = ", ".join(card.name for card in cards) or "none"
        raise UnknownModel(f"no model {name!r} can answer now", hint=f"those that can: {known}")
    return json_response(_model(card))


def _model(card: ModelCard) -> Model:
    return Model(id=card.name, created=card.created)
