"""Messages by which peers describe themselves and the models that they have."""

from typing import Annotated, ClassVar

from meshd.bounds import MAX_MQTT_DEVICES, at_most
from meshd.protocol.messages.base import Lane, Message, Reply, Request, message
from meshd.types import ModelCard, ModelId, MqttDevice, Status


@message(17)
class FetchHeader(Request, frozen=True, kw_only=True):
    """Request the tokenizer and chat template of a model that the sender will coordinate but does not have."""

    model: ModelId


@message(18)
class HeaderData(Reply, frozen=True, kw_only=True):
    """Payload: the GGUF file up to its tensor data."""

    default_lane: ClassVar[Lane] = Lane.BULK
    card: ModelCard


@message(19)
class PeerStatus(Message, frozen=True, kw_only=True):
    """The sender's status. Sent when a link comes up, on every change and every 5 s."""

    status: Status


@message(20)
class FetchProfile(Request, frozen=True, kw_only=True):
    """Request the receiver's profile, because the hash in its status has changed."""


@message(21)
class ProfileData(Reply, frozen=True, kw_only=True):
    """Payload: the sender's `Profile`, as a msgpack map."""

    default_lane: ClassVar[Lane] = Lane.BULK


@message(98)
class MqttDevices(Message, frozen=True, kw_only=True):
    """All devices with a key for jobs over MQTT that the sender knows of. Sent when a link comes up, and when the list has changed.

    Only for peers with the feature `mqtt`.
    """

    default_lane: ClassVar[Lane] = Lane.BULK
    devices: Annotated[tuple[MqttDevice, ...], at_most(MAX_MQTT_DEVICES)] = ()
