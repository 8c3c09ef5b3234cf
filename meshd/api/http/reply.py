"""JSON responses."""

from typing import Any, Literal

import msgspec
from aiohttp import web


class Rows(msgspec.Struct, frozen=True):
    """A list of rows. The keys of the rows are a stable interface."""

    data: list[dict[str, Any]]
    object: Literal["list"] = "list"


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Encode `body`, a struct or plain data, as a JSON response."""
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")
