"""The routes under `/mesh/v1/key`: rotations of the cluster's key, which only the owner can sign, and copies of the owner key.

A client with the admin scope can pass a rotation on, and no more: the daemon checks the owner's signature. The command line signs
with the owner key in the state folder.
"""

import base64
import binascii
from typing import Annotated, Any

import msgspec
from aiohttp import web

from meshd.api.http.body import read_body
from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.bounds import Label, Sha256
from meshd.errors import InvalidRequest
from meshd.protocol.trust import MAX_CHAIN_BYTES


class RotateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/key."""

    rotation: Annotated[str, msgspec.Meta(max_length=MAX_CHAIN_BYTES * 4 // 3 + 4)]
    """The chain of rotations that ends with the new one, in base64 (protocol/SPEC.md, section 12)."""
    key: Sha256
    """The new cluster key's 32 bytes, in hex."""


class OwnerRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/key/owner."""

    peer: Label
    """The peer's name, or an unambiguous prefix of its id."""
    key: Sha256
    """The owner key's 32 bytes, in hex. Who has it may copy it."""


class OwnerGiven(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /mesh/v1/key/owner."""

    peer: str
    name: str


async def show(request: web.Request) -> web.Response:
    """Describe the cluster's key, without it, and the peers that are known."""
    return json_response(request.app[SERVICES].mesh.cluster_key())


async def rotate(request: web.Request) -> web.Response:
    """Replace the cluster's key, and exclude the peers that the owner's rotation does not list."""
    body = await read_body(request, RotateRequest)
    try:
        chain = base64.b64decode(body.rotation, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"it is not base64: {error}", param="rotation") from error
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(await services.mesh.rotate(chain, bytes.fromhex(body.key)))


async def give_owner_key(request: web.Request) -> web.Response:
    """Copy the owner key, which the request must contain, to another peer."""
    body = await read_body(request, OwnerRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        given: dict[str, Any] = await services.mesh.give_owner_key(body.peer, bytes.fromhex(body.key))
    return json_response(msgspec.convert(given, OwnerGiven))
