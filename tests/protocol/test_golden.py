"""Golden frames: the protocol does not change by accident, and a second msgpack implementation reads it."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.frames import read_frames
from meshd.protocol.codec import decode, encode
from meshd.protocol.framing import FrameLimits, frame_head
from meshd.protocol.messages import PROTOCOL_VERSION, REGISTRY

GOLDEN = Path(__file__).parent / "golden"
STEMS = sorted(path.stem for path in GOLDEN.glob("[0-9]*.json"))


def load(stem: str) -> tuple[dict[str, Any], bytes]:
    return json.loads((GOLDEN / f"{stem}.json").read_text()), (GOLDEN / f"{stem}.bin").read_bytes()


def test_every_message_has_a_golden_frame() -> None:
    assert sorted(load(stem)[0]["number"] for stem in STEMS) == sorted(REGISTRY)


@pytest.mark.parametrize("stem", STEMS)
def test_a_described_message_is_written_byte_for_byte(stem: str) -> None:
    described, frame = load(stem)
    message = msgspec.json.decode(json.dumps(described["body"]), type=REGISTRY[described["number"]])
    payload = bytes.fromhex(described["payload_hex"])
    assert frame_head(encode(message), len(payload)) + payload == frame


@pytest.mark.parametrize("stem", STEMS)
def test_a_golden_frame_is_read_as_described(stem: str) -> None:
    described, frame = load(stem)
    (read,), violation = read_frames(frame, FrameLimits())
    assert violation is None
    message = decode(read.header)
    assert type(message).__name__ == described["name"]
    assert json.loads(msgspec.json.encode(message)) == described["body"]
    assert read.payload.hex() == described["payload_hex"]


@pytest.mark.parametrize("stem", STEMS)
def test_another_msgpack_reads_the_same_message(stem: str) -> None:
    described, frame = load(stem)
    header = frame[8 : 8 + described["header_bytes"]]
    message_type = REGISTRY[described["number"]]
    number, body = msgspec.msgpack.decode(header, type=tuple[int, msgspec.Raw])
    assert number == described["number"]
    assert msgspec.msgpack.decode(body, type=message_type) == decode(header)
    again = msgspec.msgpack.encode(
        (number, decode(header))
    )  # values, not bytes: msgspec gives maps with omitted fields a longer head
    assert msgspec.msgpack.decode(again) == msgspec.msgpack.decode(header)


EARLIER = sorted((GOLDEN / "earlier").glob("*.json"))


def test_the_frames_of_every_earlier_minor_version_are_kept() -> None:
    major, minor = PROTOCOL_VERSION
    assert [path.stem for path in EARLIER] == [f"{major}.{earlier}" for earlier in range(minor)]


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: str(path.stem))
def test_every_frame_of_an_earlier_minor_version_is_read_with_defaults_for_newer_fields(path: Path) -> None:
    for described in json.loads(path.read_text()):
        (read,), violation = read_frames(bytes.fromhex(described["frame_hex"]), FrameLimits())
        assert violation is None
        message = decode(read.header)
        assert type(message).__name__ == described["name"]
        assert read.payload.hex() == described["payload_hex"]
        _assert_extends(message, json.loads(msgspec.json.encode(message)), described["body"])


def _assert_extends(value: Any, present: Any, earlier: Any) -> None:
    """Check that a value has all that it had earlier, and the defaults of the fields that were added, at any depth."""
    if isinstance(value, msgspec.Struct) and isinstance(earlier, dict):
        fields = {field.encode_name: field for field in msgspec.structs.fields(value)}
        for name, content in present.items():
            if name in earlier:
                _assert_extends(getattr(value, fields[name].name), content, earlier[name])
            else:
                assert getattr(value, fields[name].name) == fields[name].default
        assert earlier.keys() <= present.keys()
    elif isinstance(value, tuple | list) and isinstance(earlier, list):
        assert len(value) == len(earlier)
        for each in zip(value, present, earlier, strict=True):
            _assert_extends(*each)
    else:
        assert present == earlier
