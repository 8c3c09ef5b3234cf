"""Decode a request's body or query string into a typed struct. An error names the field that is wrong."""

import asyncio
import functools
import re
from contextlib import suppress
from typing import Any, TypeVar, cast

import msgspec
from aiohttp import web

from meshd.api.http.ignored import IGNORED, IgnoredFields, strict_form, unknown_fields
from meshd.api.http.services import SERVICES
from meshd.api.openai.fields import UNSUPPORTED, AnswerFields, unsupported
from meshd.errors import InvalidRequest

T = TypeVar("T", bound=msgspec.Struct)

IN_PLACE_BYTES = 64 * 1024
"""Largest body that is decoded on the event loop, in at most about a millisecond. A larger one is decoded in a thread."""

_PIECE_BYTES = 1 << 20
MAX_BRACKETS = 1_000_000
"""Most opening brackets of a body, those in its texts included: a list of empty lists takes 16 times its size in memory."""

MAX_STRINGS = 100_000
"""Most strings of a body, names included. To decode more takes so long that other requests notice: no thread runs meanwhile."""

# The parts of msgspec's error messages that name a field.
_AT = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<field>.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>.*)`")


async def read_body(request: web.Request, shape: type[T]) -> T:
    """Read the body and decode it as `decode_body` does. The names of ignored fields are stored with the request.

    Raises: InvalidRequest, HTTPRequestEntityTooLarge, HTTPRequestTimeout.
    """
    data = await _read(request)
    if len(data) <= IN_PLACE_BYTES:
        body, request[IGNORED] = decode_body(data, shape)
    else:
        body, request[IGNORED] = await asyncio.to_thread(decode_body, data, shape)
    return body


async def _read(request: web.Request) -> bytes:
    limits = request.app[SERVICES].limits
    if (request.content_length or 0) > limits.body_bytes:
        raise web.HTTPRequestEntityTooLarge(max_size=limits.body_bytes, actual_size=request.content_length or 0)
    try:
        async with asyncio.timeout(limits.body_s):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="the body did not arrive in time: send it without a pause") from None
    except web.RequestPayloadError:
        drop_broken_body(request)
        raise InvalidRequest(
            "the body can't be read: it is not encoded as its headers say", hint="check `Content-Encoding` and `Transfer-Encoding`"
        ) from None


def drop_broken_body(request: web.Request) -> None:
    """Skip the rest of a body that can't be read, and close the connection after the response: nobody knows where the body ends.

    Does nothing for other bodies. If it is not called, aiohttp reads the rest and logs a traceback.
    """
    if request.content.exception() is not None:
        request.content.feed_eof()
        if request.protocol is not None:
            request.protocol.close()


def decode_body(data: bytes, shape: type[T]) -> tuple[T, IgnoredFields]:
    """Decode JSON.

    Returns: the body, and the fields that have no effect. A struct that forbids unknown fields has none.
    Raises: InvalidRequest, whose `param` names the first wrong field.
    """
    _check_counts(data)
    try:
        body, ignored = _decode(data, shape)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), shape) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", hint="send one JSON object in UTF-8") from None
    if isinstance(body, AnswerFields):
        for name in body.without_effect():
            ignored.add(name)
    return body, ignored


def _decode(data: bytes, shape: type[T]) -> tuple[T, IgnoredFields]:
    with suppress(msgspec.ValidationError):
        return cast("T", _decoder(strict_form(shape)).decode(data)), IgnoredFields([])
    body = cast("T", _decoder(shape).decode(data))
    return body, unknown_fields(data, shape)


def _check_counts(data: bytes) -> None:
    """Refuse a body with very many values, without decoding it. Raises: InvalidRequest.

    It is searched in pieces, because no other thread of Python runs during one search.
    """
    pieces = [data[begin : begin + _PIECE_BYTES] for begin in range(0, len(data), _PIECE_BYTES)]
    # Of a name that ends with a backslash, only one mark may be counted: so up to twice as many pass.
    marks = sum(piece.count(b'"') for piece in pieces)
    if marks > 2 * MAX_STRINGS and marks - sum(piece.count(b'\\"') for piece in pieces) > 2 * MAX_STRINGS:
        raise InvalidRequest(
            f"the body has more than {MAX_STRINGS} strings", hint="send fewer prompts, messages or fields in one request"
        )
    if sum(piece.count(b"[") + piece.count(b"{") for piece in pieces) > MAX_BRACKETS:
        raise InvalidRequest(
            f"the body has more than {MAX_BRACKETS} brackets",
            hint="send fewer lists and objects, or a shorter text, in one request",
        )


def read_query(request: web.Request, shape: type[T]) -> T:
    """Decode the query string, and convert its values to the types of `shape`. Lists are written `name=a&name=b` or `name[]=a`.

    The names of unknown fields are stored with the request.

    Raises: InvalidRequest.
    """
    values: dict[str, str | list[str]] = {}
    known, ignored = properties_of(shape), IgnoredFields([])
    request[IGNORED] = ignored
    for key in request.query:
        name = key.removesuffix("[]")
        found = request.query.getall(key)
        if name not in known:
            ignored.add(name)
            continue
        values[name] = found if _is_list(shape, name) or len(found) > 1 else found[0]
    try:
        return msgspec.convert(values, shape, strict=False)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), shape) from None


@functools.cache
def _decoder(shape: type[msgspec.Struct]) -> msgspec.json.Decoder[msgspec.Struct]:
    return msgspec.json.Decoder(shape)


def _field_error(text: str, shape: type[msgspec.Struct]) -> InvalidRequest:
    at = _AT.search(text)
    path = at["path"].replace("[...]", "") if at else ""
    what = _AT.sub("", text)
    named = _UNKNOWN.search(what) or _MISSING.search(what)
    param = ".".join(part for part in (path, named["field"] if named else "") if part)
    if named:
        reason = "is not a known field" if _UNKNOWN.search(what) else "is required"
        return InvalidRequest(f"`{param}` {reason}", param=param, hint="see /openapi.json for all fields")
    if not param:
        return InvalidRequest(f"the body is invalid: {what}", hint="send one JSON object")
    root = re.split(r"[.\[]", param)[0]
    schema = properties_of(shape).get(root, {})
    hint = schema.get("description", "see /openapi.json for its type")
    if UNSUPPORTED in schema:
        return unsupported(root, hint)
    return InvalidRequest(f"`{param}` is invalid: {what}", param=param, hint=hint)


def _is_list(shape: type[msgspec.Struct], name: str) -> bool:
    schema = properties_of(shape).get(name, {})
    return any(kind.get("type") == "array" for kind in schema.get("anyOf", [schema]))


@functools.cache
def properties_of(shape: type[msgspec.Struct]) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each field, by name."""
    _, components = msgspec.json.schema_components([shape])
    properties: dict[str, dict[str, Any]] = components[shape.__name__]["properties"]
    return properties
