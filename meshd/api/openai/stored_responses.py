"""Encode and decode the renderers in session records, and extract the secret from an answer's id."""

import re

import msgspec

from meshd.agents.service import AnswerSecret
from meshd.api.openai.chat.renderer import ChatRenderer
from meshd.api.openai.completions.renderer import CompletionRenderer
from meshd.api.openai.responses.renderer import ResponseRenderer
from meshd.errors import UnknownSession

AnyRenderer = ChatRenderer | CompletionRenderer | ResponseRenderer

_ID = re.compile("(resp_|chatcmpl-|cmpl-)([0-9a-f]{32})")
_decoder: msgspec.msgpack.Decoder[AnyRenderer] = msgspec.msgpack.Decoder(AnyRenderer)


def encode_renderer(renderer: AnyRenderer) -> bytes:
    """Encode a renderer for `GenerationRequest.renderer`."""
    return msgspec.msgpack.encode(renderer)


def secret_of(answer_id: str) -> AnswerSecret:
    """Extract the secret from an answer's id. Raises: UnknownSession if the answer's id is malformed."""
    match = _ID.fullmatch(answer_id)
    if match is None:
        raise _unknown(answer_id)
    return AnswerSecret(match[2])


def decode_renderer(encoded: bytes, answer_id: str) -> AnyRenderer:
    """Decode the stored renderer of the answer with this id.

    Raises: UnknownSession if the answer belongs to another route, may not be read again, or can't be decoded.
    """
    try:
        renderer = _decoder.decode(encoded)
    except msgspec.MsgspecError:  # `encoded` is empty (one of several answers) or of another version
        raise _unknown(answer_id) from None
    if not (renderer.store and answer_id.startswith(renderer.prefix)):
        raise _unknown(answer_id)
    return renderer


def _unknown(answer_id: str) -> UnknownSession:
    return UnknownSession(f"no answer has the id {answer_id!r}", hint="answers are stored for some minutes after their end")
