"""The messages of a pairing: frames and bounds."""

import msgspec
import pytest

from meshd.errors import ProtocolViolation
from meshd.protocol.pairing import messages
from meshd.protocol.pairing.messages import Admit, Answer, AnyMessage, Confirm, Invitation, Join, Stored

ALL: list[AnyMessage] = [
    Join(share=b"A" * 33),
    Answer(share=b"B" * 33, proof=b"p" * 32),
    Confirm(proof=b"p" * 32, sealed=b"s"),
    Admit(sealed=b"x" * 8192),
    Stored(sealed=b"t" * 16),
]


@pytest.mark.parametrize("message", ALL)
def test_a_message_survives_its_frame(message: AnyMessage) -> None:
    frame = messages.encode(message)
    assert messages.length_of(frame[:2]) == len(frame) - 2
    assert messages.decode(frame[2:]) == message


@pytest.mark.parametrize("length", [0, messages.MAX_BYTES + 1, 65535])
def test_a_length_out_of_bounds_is_refused_before_anything_is_read(length: int) -> None:
    with pytest.raises(ProtocolViolation):
        messages.length_of(length.to_bytes(2, "big"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        msgspec.msgpack.encode({"type": "join"}),
        msgspec.msgpack.encode({"type": "join", "share": b"A" * 32}),
        msgspec.msgpack.encode({"type": "join", "share": "A" * 33}),
        msgspec.msgpack.encode({"type": "admit", "sealed": b"x" * 8193}),
        msgspec.msgpack.encode({"type": "other"}),
        b"\x91" * 5000,
    ],
)
def test_a_malformed_message_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        messages.decode(body)


def test_names_that_no_peer_can_have_are_refused() -> None:
    assert messages.decode_joiner(messages.encode_joiner("attic")) == "attic"
    for name in ("", "a b", "\x1b[2J", "a" * 64):
        with pytest.raises(ProtocolViolation):
            messages.decode_joiner(messages.encode_joiner(name))
    with pytest.raises(ProtocolViolation):
        messages.decode_invitation(messages.encode_invitation(Invitation(join_code="x", name="\x1b", link_port=1)))
    with pytest.raises(ProtocolViolation):
        messages.decode_invitation(messages.encode_invitation(Invitation(join_code="x", name="a", link_port=0)))
