"""Headers: a message survives encoding and decoding, and any other bytes raise ProtocolViolation."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import InvalidRequest, ProtocolViolation
from meshd.protocol.codec import UnknownMessage, decode, encode
from meshd.protocol.framing import frame_head
from meshd.protocol.messages import (
    REGISTRY,
    Ack,
    Close,
    Error,
    Failed,
    Goodbye,
    Heartbeat,
    KvStored,
    Message,
    Open,
    Placed,
    Tokens,
)
from meshd.types import LayerRange, Plan, SamplingParams, TokenLogprobs

json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4),
    max_leaves=12,
)


def test_nested_structs_integer_keys_and_ranges_survive() -> None:
    opened = Open(
        request=1,
        session="5e" * 16,
        epoch=2,
        plan=Plan(id="p", model="fe" * 16, stages=(), prefill_chunk_tokens=8, context=16),
        stage=0,
        coordinator="c" * 52,
        prompt_tokens=3,
        max_tokens=4,
        sampling=SamplingParams(logit_bias={5: -1.0, 7: 2.5}),
        lease_ms=1,
        deadline_ms=1,
        credit=1,
    )
    tokens = Tokens(session="5e" * 16, epoch=1, index=0, tokens=(9,), logprobs=(TokenLogprobs(-1.0, ((9, -1.0),)),))
    for message in (opened, tokens, Placed(request=1, layers=LayerRange(3, 9), kv_tokens=5)):
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


@given(number=st.integers(0, 80), body=json_like)
def test_any_msgpack_decodes_or_is_a_violation(number: int, body: object) -> None:
    try:
        message = decode(msgpack.packb([number, body]))
    except ProtocolViolation:
        return
    assert decode(encode(message)) == message or isinstance(message, UnknownMessage)


@given(sequence=st.integers(0, 2**63 - 1))
def test_serial_numbers_of_63_bits_survive(sequence: int) -> None:
    beat = Heartbeat(sequence=sequence, sent_ns=sequence)
    assert decode(encode(beat)) == beat


@pytest.mark.parametrize("index", [-1, 2**27, 2**62, 2**64])
def test_what_the_receiver_would_refuse_is_refused_at_the_sender(index: int) -> None:
    with pytest.raises(InvalidRequest, match="Ack can't be sent"):
        encode(Ack(session="5e" * 16, epoch=1, stage=1, next_seq=0, credit=index))


GOLDEN = Path(__file__).parent / "golden"
FRAMES = {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.bin"))}
_HEAD = len(frame_head(b"", 0))
HOSTILE_NUMBERS = (-1, -(10**8), 2**62, 2**64 - 1, math.nan, math.inf, -math.inf)
HOSTILE_TEXTS = ("\x1b[2J", "a\nb", "\u202eb", "x" * 30_000)


def body_of(frame: bytes) -> dict[str, Any]:
    """Returns: the message of a golden frame as plain values, with the fields that have their default."""
    message = decode(frame[_HEAD : _HEAD + int.from_bytes(frame[:4], "big")])
    body: dict[str, Any] = msgspec.to_builtins(message)
    return body


def leaves(value: Any, put: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield each number and text in a plain value, with a function that replaces it in place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, lambda new, key=key: value.__setitem__(key, new))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, lambda new, index=index: value.__setitem__(index, new))
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield value, put


def arrays(value: Any) -> Iterator[list[Any]]:
    """Yield all arrays in a plain value that are not empty."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, list) and value:
        yield value
    for part in inner:
        yield from arrays(part)


def accepted(number: int, body: dict[str, Any]) -> bool:
    try:
        decode(msgpack.packb([number, body]))
    except ProtocolViolation:
        return False
    return True


@pytest.mark.parametrize("stem", FRAMES)
def test_every_number_and_text_of_every_message_is_bounded(stem: str) -> None:
    number, frame = int(stem.partition("_")[0]), FRAMES[stem]
    body = body_of(frame)
    assert accepted(number, body)
    for value, put in leaves(body):
        hostile = HOSTILE_TEXTS if isinstance(value, str) else HOSTILE_NUMBERS
        taken = []
        for other in hostile:
            put(other)
            if accepted(number, body):
                taken.append(other)
        put(value)
        # Only serial numbers and seeds have 63 bits, and only logit biases, penalties, logprobs and seeds are below 0.
        assert set(taken) <= {2**62, -1, -(10**8)}, f"{value!r} of {stem} may be {taken}"


@pytest.mark.parametrize("stem", FRAMES)
def test_every_list_of_every_message_is_bounded(stem: str) -> None:
    number, body = int(stem.partition("_")[0]), body_of(FRAMES[stem])
    known = decode(msgpack.packb([number, body]))
    for found in arrays(body):
        before = found[:]
        found.extend(before[-1:] * 1100)
        # A struct that is written as an array may have more fields in a later version: they are skipped.
        assert not accepted(number, body) or decode(msgpack.packb([number, body])) == known, f"{before} of {stem} has no bound"
        found[:] = before


def test_there_is_a_golden_frame_of_every_message() -> None:
    assert {int(stem.partition("_")[0]) for stem in FRAMES} == set(REGISTRY)


@pytest.mark.parametrize("changed", [{"tokens": 0}, {"kind": "prefil"}, {"kind": 3}, {"ids": [1] * 33}, None])
def test_steps_without_a_step_or_with_one_that_cannot_be_are_a_violation(changed: dict[str, Any] | None) -> None:
    step = body_of(FRAMES["72_steps"])["steps"][0]
    assert accepted(72, {"steps": [step]})
    assert not accepted(72, {"steps": [] if changed is None else [step | changed]})
    assert not accepted(72, {"steps": [step] * 65})


@pytest.mark.parametrize("tokens", [[], [1] * 33])
def test_no_tokens_and_more_than_one_step_can_give_are_a_violation(tokens: list[int]) -> None:
    assert not accepted(74, body_of(FRAMES["74_tokens"]) | {"tokens": tokens})


@pytest.mark.parametrize("layers", [[0, 2**62], [-(10**8), 30], [5, 2], [3, 3], [0, 1025], [0], [2**64 - 1, 0]])
def test_a_range_of_layers_that_is_reversed_empty_or_huge_is_a_violation(layers: list[int]) -> None:
    with pytest.raises(ProtocolViolation):
        decode(msgpack.packb([33, {"request": 1, "layers": layers, "kv_tokens": 1}]))


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Error(code="c", message=text, hint=text),
        lambda text: Goodbye(reason=text),
        lambda text: Close(session="5e" * 16, epoch=1, reason=text),
        lambda text: Failed(session="5e" * 16, epoch=1, step=0, stage=0, code="c", message=text),
        lambda text: KvStored(session="5e" * 16, epoch=1, layers=LayerRange(0, 1), held=0, error=text),
    ],
)
@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred", "x" * 100_000, "tab\there"], ids=ascii)
def test_a_sentence_that_quotes_something_else_is_cut_and_can_be_sent(make: Any, text: str) -> None:
    message: Message = make(text)
    assert decode(encode(message)) == message
