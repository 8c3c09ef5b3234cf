"""The records of steps: bounded, and checked when they come from another peer."""

import struct

import pytest

from meshd.agents.observe.spans import MAX_BYTES, MAX_SESSIONS, MAX_SPANS, RECORD_BYTES, Span, SpanKind, Spans, decode_spans
from meshd.errors import ProtocolViolation
from meshd.types import SessionId

ONE, OTHER = SessionId("1" * 32), SessionId("2" * 32)


def span(position: int) -> Span:
    return Span(SpanKind.DECODE, 3, 1, position, 1, 10.0, 10.5, 11.0, 11.25)


def test_records_are_read_as_they_were_added() -> None:
    spans, prefill = Spans(), Span(SpanKind.PREFILL, 1, 0, 0, 256, 1.0, 2.0, 3.0, 4.0)
    spans.add(ONE, prefill)
    spans.add(ONE, span(256))
    spans.add(OTHER, span(7))
    data, dropped = spans.of(ONE)
    assert (decode_spans(data), dropped) == ([prefill, span(256)], 0)
    assert spans.of(SessionId("3" * 32)) == (b"", 0)


def test_the_oldest_records_of_a_long_session_go_and_are_counted() -> None:
    spans = Spans()
    for position in range(5 * MAX_SPANS):
        spans.add(ONE, span(position))
    data, dropped = spans.of(ONE)
    kept = decode_spans(data)
    assert MAX_SPANS <= len(kept) < 2 * MAX_SPANS
    assert [record.position for record in kept] == list(range(dropped, 5 * MAX_SPANS))
    assert spans.size == len(data)


def test_all_sessions_together_are_bounded() -> None:
    spans = Spans()
    for number in range(3 * MAX_SESSIONS):
        spans.add(SessionId(f"{number:032}"), span(number))
    assert len(spans) == MAX_SESSIONS
    assert spans.of(SessionId("0" * 32)) == (b"", 0)
    for number in range(MAX_BYTES // RECORD_BYTES // MAX_SPANS + 10):
        for position in range(MAX_SPANS):
            spans.add(SessionId(f"{number:032x}"), span(position))
    assert spans.size <= MAX_BYTES
    assert spans.size == sum(len(records.data) for records in spans._sessions.values())


@pytest.mark.parametrize(
    "data",
    [
        b"x" * (RECORD_BYTES - 1),
        bytes(RECORD_BYTES) * (2 * MAX_SPANS + 1),
        struct.pack("<IIIHBx4d", 1, 1, 1, 1, 3, 0.0, 0.0, 0.0, 0.0),
        struct.pack("<IIIHBx4d", 1, 1, 1, 1, 1, 0.0, float("nan"), 0.0, 0.0),
        struct.pack("<IIIHBx4d", 1, 1, 1, 1, 1, 0.0, 1.0, 2.0, float("inf")),
        struct.pack("<IIIHBx4d", 1, 1, 1, 1, 1, 2.0, 1.0, 3.0, 4.0),
    ],
    ids=["torn", "too many", "kind", "nan", "infinity", "order"],
)
def test_records_of_another_peer_are_checked(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_spans(data)
