"""The form and the size of a presence."""

import base64

import msgspec
import pytest

from meshd.agents.membership.fleet.presence import MAX_ADDRESSES, MAX_UNREACHED, Presence, read_presence, sign_presence
from meshd.agents.membership.fleet.topics import PRESENCE_BYTES
from meshd.errors import PeerRefused
from meshd.protocol.identity import Identity
from meshd.types import PeerId

LARGEST = {
    "name": "n" * 63,
    "at": 1 << 53,
    "since": 1 << 53,
    "addresses": ("255.255.255.255",) * MAX_ADDRESSES,
    "port": 65535,
    "version": "v" * 64,
    "protocol": "3" * 16,
    "load": (1 << 31) - 1,
    "unreached": (PeerId("a" * 52),) * MAX_UNREACHED,
}


def test_the_largest_presence_fits(identity: Identity) -> None:
    presence = Presence(cluster=identity.fingerprint, peer=identity.peer, **LARGEST)  # type: ignore[arg-type]
    data = sign_presence(identity, presence)
    assert read_presence(data)[0] == presence
    assert len(data) < PRESENCE_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"addresses": ["10.0.0.1"] * (MAX_ADDRESSES + 1)},
        {"addresses": ["a b"]},
        {"unreached": ["x"]},
        {"port": 70000},
        {"at": -1},
        {"name": "\x1b[2J"},
        {"cluster": "x"},
    ],
)
def test_a_presence_out_of_bounds_is_refused(identity: Identity, fields: dict[str, object]) -> None:
    body = {"cluster": identity.fingerprint, "peer": identity.peer, "name": "one", "at": 1, "since": 1} | fields
    lines = (msgspec.json.encode(body), base64.b64encode(identity.certificate), base64.b64encode(bytes(64)))
    with pytest.raises(PeerRefused, match="malformed"):
        read_presence(b"\n".join(lines))


def test_a_long_presence_is_refused_unread() -> None:
    with pytest.raises(PeerRefused, match="bytes"):
        read_presence(b"x" * (PRESENCE_BYTES + 1))
