"""`GET /openapi.json`: an OpenAPI 3.1 document, made from the routes and from the structs that validate requests."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from meshd import __version__
from meshd.api.access.scopes import Need, need_of
from meshd.api.http.body import properties_of
from meshd.api.http.errors import ErrorBody
from meshd.api.http.ignored import HEADER as IGNORED_HEADER
from meshd.api.http.reply import json_response
from meshd.api.http.routes import ROUTES, Route

_PARAMETER = re.compile(r"{(\w+)(?::[^}]*)?}")
_JSON = "application/json"
_SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of `meshd key api add`. The role is the scope that it needs.",
    },
    "header": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same key, as Anthropic's clients send it.",
    },
}


async def openapi(request: web.Request) -> web.Response:
    """Send the OpenAPI document."""
    return json_response(document())


@functools.cache
def document() -> dict[str, Any]:
    """Describe all routes and their bodies as an OpenAPI 3.1 document."""
    types = [ErrorBody, *(kind for route in ROUTES for part in (route.takes, route.gives, route.streams) for kind in _kinds(part))]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "meshd", "version": __version__, "description": "One language model across many devices."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": _SECURITY},
    }


def _operation(route: Route, schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.gives is not None:
        content[_JSON] = {"schema": _any_of(route.gives, schema_of)}
    if route.streams is not None:
        content["text/event-stream"] = {"schema": _any_of(route.streams, schema_of)}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": _operation_id(route),
        "responses": {
            "200": {"description": "Done", "content": content or {"text/plain": {}}, "headers": _headers(route)},
            "default": {"description": "An error", "content": {_JSON: {"schema": schema_of[id(ErrorBody)]}}},
        },
    }
    operation |= _security(need_of(route.method, route.path))
    if route.takes is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema_of[id(route.takes)]}}}
    if parameters := _parameters(route):
        operation["parameters"] = parameters
    return operation


def _security(need: Need) -> dict[str, Any]:
    """Describe what a request needs: a key in one of two headers, with this scope; nothing while a daemon has no keys at all."""
    if need is Need.NOTHING:
        return {"security": []}
    scopes = [] if need is Need.ANY_KEY else ["admin" if need is Need.OWNER else need.value]
    return {"security": [*({name: scopes} for name in _SECURITY), *([] if need is Need.OWNER else [{}])]}


def _headers(route: Route) -> dict[str, Any]:
    """Describe the headers of a response, besides those of HTTP."""
    described = {"x-request-id": "The request's id."}
    if route.takes is not None or route.query is not None:
        described[IGNORED_HEADER] = "Fields of the request that had no effect, such as `messages[0].id`. Absent: none."
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in described.items()}


def _kinds(part: Any) -> tuple[Any, ...]:
    """Return the alternative types of a body: several, one, or none if the route has no such body."""
    return part if isinstance(part, tuple) else () if part is None else (part,)


def _any_of(part: Any, schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    schemas = [schema_of[id(kind)] for kind in _kinds(part)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _parameters(route: Route) -> list[dict[str, Any]]:
    names: Sequence[str] = _PARAMETER.findall(route.path)
    query = properties_of(route.query) if route.query is not None else {}
    return [
        *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names),
        *({"name": name, "in": "query", "schema": schema} for name, schema in query.items()),
    ]


def _operation_id(route: Route) -> str:
    words = re.findall(r"\w+", _PARAMETER.sub(r"\1", route.path))
    return "_".join([route.method.lower(), *words])
