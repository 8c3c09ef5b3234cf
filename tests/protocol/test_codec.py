"""Headers: a message survives encoding and decoding, and any other bytes raise ProtocolViolation."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import InvalidRequest, ProtocolViolation
from meshd.protocol.codec import UnknownMessage, decode, encode
from meshd.protocol.messages import Credit, Error, Heartbeat, Open, Placed, Token
from meshd.types import LayerRange, Plan, SamplingParams, TokenLogprobs

json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4),
    max_leaves=12,
)


def test_nested_structs_integer_keys_and_ranges_survive() -> None:
    opened = Open(
        request=1,
        session="s" * 32,
        epoch=2,
        plan=Plan(id="p", model="m", stages=(), prefill_chunk_tokens=8, context=16),
        stage=0,
        coordinator="c" * 52,
        prompt_tokens=3,
        max_tokens=4,
        sampling=SamplingParams(logit_bias={5: -1.0, 7: 2.5}),
        lease_ms=1,
        credit=1,
    )
    token = Token(session="s", epoch=1, step=1, index=0, token=9, logprobs=TokenLogprobs(-1.0, ((9, -1.0),)))
    for message in (opened, token, Placed(request=1, layers=LayerRange(3, 9), kv_tokens=5)):
        assert decode(encode(message)) == message


def test_a_field_that_this_build_does_not_know_is_skipped() -> None:
    header = msgpack.packb([3, {"sequence": 1, "sent_ns": 2, "colour": "blue"}])
    assert decode(header) == Heartbeat(sequence=1, sent_ns=2)


def test_a_missing_field_gets_its_default() -> None:
    assert decode(msgpack.packb([2, {"code": "c", "message": "m"}])) == Error(code="c", message="m")


def test_an_unknown_type_number_is_returned_with_its_request_number() -> None:
    assert decode(msgpack.packb([999, {"request": 7, "x": [1]}])) == UnknownMessage(number_of=999, request=7)
    assert decode(msgpack.packb([999, {"request": "seven"}])) == UnknownMessage(number_of=999)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x01",
        msgpack.packb([3]),
        msgpack.packb({"3": {}}),
        msgpack.packb([3, []]),
        msgpack.packb([True, {}]),
        msgpack.packb([3.0, {}]),
        msgpack.packb([3, {}]),
        msgpack.packb([3, {"sequence": "1", "sent_ns": 2}]),
        msgpack.packb([3, {"sequence": True, "sent_ns": 2}]),
        msgpack.packb([3, {"sequence": 1, "sent_ns": 2}]) + b"\x00",
        msgpack.packb([3, {"sequence": b"bytes", "sent_ns": 2}]),
        msgpack.packb([3, {"sequence": msgpack.ExtType(1, b"x"), "sent_ns": 2}]),
        msgpack.packb([3, {"sequence": msgpack.Timestamp(1), "sent_ns": 2}]),
        b"\x92\x03\x81\x90\x01",
        b"\x92\x03\x81\xa1\xff\x01",
        b"\x91" * 3000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        msgpack.packb([3, {"sequence": 1, "sent_ns": 2, "list": [0] * 20_000}]),
        msgpack.packb([3, {"sequence": 1, "sent_ns": 2, "text": "x" * 40_000}]),
    ],
)
def test_bytes_that_are_not_a_message_are_a_violation(header: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode(header)


@given(header=st.binary(max_size=200))
def test_any_bytes_decode_or_are_a_violation(header: bytes) -> None:
    try:
        decode(header)
    except ProtocolViolation:
        return


@given(number=st.integers(0, 70), body=json_like)
def test_any_msgpack_decodes_or_is_a_violation(number: int, body: object) -> None:
    try:
        message = decode(msgpack.packb([number, body]))
    except ProtocolViolation:
        return
    assert decode(encode(message)) == message or isinstance(message, UnknownMessage)


@given(index=st.integers(-(2**63), 2**64 - 1))
def test_integers_of_64_bits_survive(index: int) -> None:
    credit = Credit(session="s", epoch=1, index=index)
    assert decode(encode(credit)) == credit


def test_an_integer_beyond_64_bits_can_not_be_sent() -> None:
    with pytest.raises(InvalidRequest):
        encode(Credit(session="s", epoch=1, index=2**64))
