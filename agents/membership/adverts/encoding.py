"""Encodes a peer's profile, with a hash and a bound on its size, and decodes those of other peers.

House rules of this file: no I/O and no clock.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from meshd.bounds import MAX_LISTED
from meshd.errors import ProtocolViolation
from meshd.types import Advert, ModelCard, PeerId, Profile, Status

MAX_PROFILE_BYTES = 1 << 20
"""Largest encoded profile. A model's card takes 0.9 to 1.5 KB, so this is enough for more than 700 models."""
_HASH_BYTES = 16
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Profile)


@dataclass(frozen=True, slots=True)
class EncodedProfile:
    """A profile as it is sent."""

    data: bytes
    hash: str
    left_out: int
    """Number of models whose cards did not fit in `MAX_PROFILE_BYTES`, or in the number of cards that a profile may list."""


def encode_profile(profile: Profile) -> EncodedProfile:
    """Encode a profile. Cards that do not fit are left out, from the end of `profile.models`."""
    data = _encoder.encode(profile)
    models = profile.models
    if len(data) > MAX_PROFILE_BYTES or len(models) > MAX_LISTED:
        models = tuple(
            _that_fit(models[:MAX_LISTED], MAX_PROFILE_BYTES - len(_encoder.encode(msgspec.structs.replace(profile, models=()))))
        )
        data = _encoder.encode(msgspec.structs.replace(profile, models=models))
    return EncodedProfile(data, hash_of(data), len(profile.models) - len(models))


def decode_profile(data: bytes | memoryview) -> Profile:
    """Decode another peer's profile. Raises: ProtocolViolation if it is too large or malformed."""
    if len(data) > MAX_PROFILE_BYTES:
        raise ProtocolViolation(f"its profile has {len(data)} bytes, where {MAX_PROFILE_BYTES} are allowed")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"its profile is malformed: {error}") from error


def hash_of(data: bytes | memoryview) -> str:
    """Returns: the hash by which a status names this encoded profile, in hex."""
    return hashlib.sha256(data).hexdigest()[: 2 * _HASH_BYTES]


def merge(peer: PeerId, name: str, version: str, incarnation: int, profile: Profile, status: Status) -> Advert:
    """Combine what is known of a peer."""
    return Advert(
        peer=peer,
        name=name,
        incarnation=incarnation,
        revision=status.revision,
        version=version,
        capability=msgspec.structs.replace(profile.capability, memory_free_bytes=status.memory_free_bytes),
        holdings=status.holdings,
        models=profile.models,
        links=status.links,
        neighbours=status.neighbours,
        learned=status.learned,
        sessions=status.sessions,
        api=profile.api,
        draining=status.draining,
        device=status.device,
    )


def _that_fit(models: Iterable[ModelCard], room_bytes: int) -> Iterable[ModelCard]:
    # An array's length takes up to 4 bytes more than that of the empty array.
    room_bytes -= 4
    for card in models:
        room_bytes -= len(_encoder.encode(card))
        if room_bytes < 0:
            return
        yield card
