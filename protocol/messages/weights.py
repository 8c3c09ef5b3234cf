"""Messages that copy weights from peer to peer."""

from typing import ClassVar

from meshd.bounds import Sha256, Size
from meshd.protocol.messages.base import Lane, Reply, Request, message
from meshd.types import ModelCard, ModelId


@message(40)
class FetchManifest(Request, frozen=True, kw_only=True):
    """Request the list of tensors of a model that the receiver has."""

    model: ModelId


@message(41)
class ManifestData(Reply, frozen=True, kw_only=True):
    """Payload: the manifest (msgpack): for each tensor its offset in the file, its SHA-256, and whether the sender has it."""

    default_lane: ClassVar[Lane] = Lane.BULK
    card: ModelCard
    sha256: Sha256
    """SHA-256 of the payload, in hex."""


@message(42)
class FetchWeights(Request, frozen=True, kw_only=True):
    """Request bytes `[offset, offset + length)` of a model's file, all of them in tensors that the receiver has."""

    model: ModelId
    offset: Size
    length: Size


@message(43)
class WeightData(Reply, frozen=True, kw_only=True):
    """Payload: the requested bytes."""

    default_lane: ClassVar[Lane] = Lane.BULK
    offset: Size
