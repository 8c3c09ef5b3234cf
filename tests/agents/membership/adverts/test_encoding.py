"""A profile's encoding: its hash, its bound, and what another peer may send."""

import msgspec
import pytest

from in_process.clusters import make_card
from in_process.peer_events import PROFILE
from meshd.agents.membership.adverts.encoding import MAX_PROFILE_BYTES, decode_profile, encode_profile, hash_of
from meshd.errors import ProtocolViolation
from meshd.types import ModelId, Profile

CARD = make_card(64)


def profile_of(models: int) -> Profile:
    cards = tuple(msgspec.structs.replace(CARD, id=ModelId(f"{number:032x}")) for number in range(models))
    return msgspec.structs.replace(PROFILE, models=cards)


def test_a_profile_is_decoded_as_it_was() -> None:
    encoded = encode_profile(profile_of(300))
    assert decode_profile(encoded.data) == profile_of(300)
    assert (encoded.hash, encoded.left_out) == (hash_of(encoded.data), 0)
    assert encode_profile(profile_of(299)).hash != encoded.hash


def test_of_too_many_models_the_first_that_fit_are_sent() -> None:
    encoded = encode_profile(profile_of(2000))
    assert MAX_PROFILE_BYTES - 4096 < len(encoded.data) <= MAX_PROFILE_BYTES
    kept = decode_profile(encoded.data).models
    assert kept == profile_of(2000).models[: len(kept)]
    assert len(kept) + encoded.left_out == 2000


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes(MAX_PROFILE_BYTES + 1), "1048576 are allowed"),
        (b"", "malformed"),
        (b"\x80", "capability"),
        (b"\x91" * 5000, "malformed"),
        (msgspec.msgpack.encode({"capability": 1}), "malformed"),
    ],
)
def test_a_profile_that_is_too_large_or_malformed_is_a_violation(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        decode_profile(data)
