"""Messages by which peers describe themselves and the models that they have."""

from typing import ClassVar

from meshd.protocol.messages.base import Lane, Message, Reply, Request, message
from meshd.types import Advert, ModelCard, ModelId


@message(16)
class Advertise(Message, frozen=True, kw_only=True):
    """The sender's present advert, whole: on link-up and on change."""

    advert: Advert


@message(17)
class FetchHeader(Request, frozen=True, kw_only=True):
    """Asks for what a coordinator needs of a model that it does not have: tokenizer and template."""

    model: ModelId


@message(18)
class HeaderData(Reply, frozen=True, kw_only=True):
    """Payload: the head of the GGUF file, up to its tensor data."""

    default_lane: ClassVar[Lane] = Lane.BULK
    card: ModelCard
    sha256: str
    """Of the payload."""
