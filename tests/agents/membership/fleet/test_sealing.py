"""Sealed jobs: the documented test vectors, and what can't be opened. The reference client agrees."""

import os
from pathlib import Path
from typing import Any

import pytest

from meshd.agents.membership.fleet.presence import Presence, sign_presence
from meshd.agents.membership.fleet.sealing import Direction, JobSeal, key_check, read_sealed
from meshd.errors import PeerRefused
from meshd.protocol.identity import ClusterKey, Identity, load_identity
from meshd.state import StateFolder
from mqtt.device import mqtt_device

DOCUMENT = (Path(__file__).parents[4] / "docs" / "fleet.md").read_text()
CLUSTER = ClusterKey(bytes(range(32)))
SERIAL, JOB, SALT = bytes(range(0x40, 0x50)), bytes(range(0x50, 0x60)), bytes(range(0x60, 0x70))
SINCE = 1_800_000_000_000
REQUEST = b'{"at":1800000001000,"model":"smollm2:135m","prompt":"Hello"}'
CHUNK = b'{"text":"Hi"}'


@pytest.fixture
def one(tmp_path: Path) -> Identity:
    return load_identity(StateFolder.open(tmp_path / "one"), CLUSTER, lambda count: bytes(range(32, 32 + count)))


@pytest.fixture
def seal(one: Identity) -> JobSeal:
    return JobSeal(
        key=CLUSTER.device_key("door", SERIAL), cluster=one.fingerprint, peer=one.peer, device="door", job=JOB.hex(), since=SINCE
    )


@pytest.fixture
def client() -> Any:
    return mqtt_device.Device("door", CLUSTER.fingerprint, SERIAL, CLUSTER.device_key("door", SERIAL))


def test_the_vectors_of_the_document_are_what_the_code_makes(one: Identity, seal: JobSeal) -> None:
    presence = Presence(
        cluster=one.fingerprint,
        peer=one.peer,
        name="desk",
        at=SINCE + 123,
        since=SINCE,
        addresses=("192.168.1.7",),
        port=6375,
        protocol="3.1",
        version="1.0",
        load=2,
    )
    assert f"presence:\n{sign_presence(one, presence).decode()}\n```" in DOCUMENT
    assert f"device key  {seal.key.hex()}" in DOCUMENT
    assert f"request 0:  {REQUEST.decode()}\n{seal.seal(Direction.REQUEST, 0, SERIAL, REQUEST).hex()}\n" in DOCUMENT
    assert f"chunk 1:    {CHUNK.decode()}\n{seal.seal(Direction.ANSWER, 1, SALT, CHUNK).hex()}\n" in DOCUMENT


def test_the_reference_client_seals_and_opens_the_same(one: Identity, seal: JobSeal, client: Any) -> None:
    peer = {"peer": one.peer, "since": SINCE}
    request = client.seal(peer, JOB, 0, {"prompt": "Hello"})
    assert seal.open(Direction.REQUEST, read_sealed(request)) == b'{"prompt": "Hello"}'
    assert client.open(peer, JOB, seal.seal(Direction.ANSWER, 1, SALT, CHUNK)) == (1, {"text": "Hi"})


@pytest.mark.parametrize(
    "change",
    [
        {"key": bytes(32)},
        {"cluster": "m" * 16},
        {"peer": "a" * 52},
        {"device": "window"},
        {"job": "00" * 16},
        {"since": SINCE + 1},
    ],
    ids=str,
)
def test_a_message_is_void_for_anything_else(seal: JobSeal, change: dict[str, Any]) -> None:
    sealed = read_sealed(seal.seal(Direction.REQUEST, 0, SERIAL, REQUEST))
    other = JobSeal(**{name: getattr(seal, name) for name in ("key", "cluster", "peer", "device", "job", "since")} | change)
    with pytest.raises(PeerRefused):
        other.open(Direction.REQUEST, sealed)


def test_a_message_with_another_direction_number_or_salt_is_void(seal: JobSeal) -> None:
    data = seal.seal(Direction.ANSWER, 3, SALT, CHUNK)
    with pytest.raises(PeerRefused):
        seal.open(Direction.REQUEST, read_sealed(data))
    for place in (4, 5, 20, 21, len(data) - 1):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(PeerRefused):
            seal.open(Direction.ANSWER, read_sealed(bytes(broken)))


@pytest.mark.parametrize("data", [b"", bytes(20), b"\x02" + bytes(40)])
def test_a_malformed_message_is_refused(data: bytes) -> None:
    with pytest.raises(PeerRefused):
        read_sealed(data)


def test_keys_of_devices_differ_by_name_serial_and_cluster() -> None:
    keys = {
        CLUSTER.device_key("door", SERIAL),
        CLUSTER.device_key("doo", b"r" + SERIAL[1:]),
        CLUSTER.device_key("door", JOB),
        ClusterKey(os.urandom(32)).device_key("door", SERIAL),
    }
    assert len(keys) == len({key_check(key) for key in keys}) == 4
