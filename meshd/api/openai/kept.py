"""Forms as they lie in a session's record, and the ids under which clients ask for them."""

import re

import msgspec

from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.api.openai.completions.renderer import CompletionRenderer
from meshd.api.openai.responses.renderer import ResponseRenderer
from meshd.errors import UnknownSession
from meshd.types import SessionId

AnyForm = ChatRenderer | CompletionRenderer | ResponseRenderer

_ID = re.compile("(resp_|chatcmpl-|cmpl-)([0-9a-f]{32})")
_decoder: msgspec.msgpack.Decoder[AnyForm] = msgspec.msgpack.Decoder(AnyForm)


def encode_renderer(form: AnyForm) -> bytes:
    """For `GenerationRequest.edge`."""
    return msgspec.msgpack.encode(form)


def session_of(answer_id: str) -> SessionId:
    """Raises: UnknownSession."""
    match = _ID.fullmatch(answer_id)
    if match is None:
        raise _unknown(answer_id)
    return SessionId(match[2])


def decode_renderer(edge: bytes, answer_id: str) -> AnyForm:
    """Of the answer with this id. Raises: UnknownSession, if its record is of another kind, or not to be read."""
    try:
        form = _decoder.decode(edge)
    except msgspec.MsgspecError:  # one of several answers, which have none; or by another version
        raise _unknown(answer_id) from None
    if not (form.store and answer_id.startswith(form.prefix)):
        raise _unknown(answer_id)
    return form


def _unknown(answer_id: str) -> UnknownSession:
    return UnknownSession(f"there is no answer with the id {answer_id!r}", hint="answers are kept for some minutes after their end")
