from typing import cast

import pytest

from in_process.frames import one_step
from meshd.agents.links.link import Link
from meshd.agents.links.meters.traffic import Traffic
from meshd.errors import PeerLost
from meshd.protocol.codec import decode, encode
from meshd.protocol.framing import Frame
from meshd.protocol.messages import Goodbye, Heartbeat, HeartbeatAck, Lane, Message, Probe, StepKind, Steps
from meshd.protocol.transport import Buffer, Connection
from meshd.types import PeerId


class RecordedConnection:
    """Stands for one lane's connection, and records what is sent and how it ends."""

    queued_bytes = 7

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.ended: list[str] = []

    def send(self, message: Message, payload: Buffer | None = None) -> None:
        self.sent.append(message)

    def encode(self, message: Message, payload: memoryview) -> bytes:
        return encode(message)

    def send_encoded(self, header: bytes, payload: memoryview) -> None:
        self.sent.append(decode(header))

    def abort(self, reason: str) -> None:
        self.ended.append(f"aborted: {reason}")

    def close(self, reason: str, farewell: Message) -> None:
        self.ended.append(f"closed: {reason}, {type(farewell).__name__}")


@pytest.fixture
def ends() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def link(ends: list[tuple[str, bool]]) -> Link:
    return Link(
        PeerId("b" * 52),
        1,
        dialled=True,
        now=lambda: 100.0,
        traffic=Traffic(),
        on_end=lambda _, reason, on_purpose: ends.append((reason, on_purpose)),
    )


def joined(link: Link) -> dict[Lane, RecordedConnection]:
    lanes = {lane: RecordedConnection() for lane in Lane}
    link.lanes = {lane: cast("Connection", connection) for lane, connection in lanes.items()}
    return lanes


def test_the_lane_follows_from_the_kind_of_a_message_and_not_from_its_size(link: Link) -> None:
    lanes = joined(link)
    for kind in StepKind:
        for size in (16, 256 * 1024):
            link.send(one_step(1, size, kind), bytes(size))
    link.beat(100.0)
    assert [type(message) for message in lanes[Lane.CONTROL].sent] == [Steps] * 4 + [Heartbeat]
    kinds = {lane: [m.steps[0].kind for m in lanes[lane].sent if isinstance(m, Steps)][::2] for lane in Lane}
    assert kinds == {Lane.CONTROL: [StepKind.DECODE, StepKind.VERIFY], Lane.BULK: [StepKind.PREFILL, StepKind.REFILL]}


def test_sending_fails_before_the_lane_is_connected(link: Link) -> None:
    assert not link.joined
    with pytest.raises(PeerLost, match="is not up"):
        link.beat(100.0)


def test_a_link_ends_once_and_an_end_with_a_farewell_is_no_fault(link: Link, ends: list[tuple[str, bool]]) -> None:
    lanes = joined(link)
    link.end("this peer stops", Goodbye(reason="this peer stops"))
    link.end("again")
    assert ends == [("this peer stops", True)]
    assert [lane.ended for lane in lanes.values()] == [["closed: this peer stops, Goodbye"]] * 2


def test_an_end_without_a_farewell_is_a_fault(link: Link, ends: list[tuple[str, bool]]) -> None:
    lanes = joined(link)
    link.end("silent")
    assert ends == [("silent", False)]
    assert [lane.ended for lane in lanes.values()] == [["aborted: silent"]] * 2


def test_the_lifetime_counts_from_when_the_link_came_up(link: Link) -> None:
    assert link.lived_s(500.0) == 0.0
    link.up_since = 200.0
    assert link.lived_s(500.0) == 300.0
    assert link.as_existing(101.5).silent_s == 1.5


def test_the_round_trip_is_a_median_and_nonsense_is_ignored(link: Link) -> None:
    joined(link)
    for _ in range(4):
        link.beat(100.0)
    for sequence, rtt_s in ((1, 0.010), (2, 0.018), (3, -5.0), (9, 0.001), (4, 0.011)):
        link.beat_answered(HeartbeatAck(sequence=sequence, sent_ns=int((100.0 - rtt_s) * 1e9)), 100.0)
    assert link.estimate.rtt_s(100.0) == pytest.approx(0.010, abs=1e-6)
    assert link.estimate.hop_s(100.0) == pytest.approx(0.0055, abs=1e-6)


def test_the_arrival_of_a_large_message_is_reported_with_the_next_answer_only(link: Link) -> None:
    lanes = joined(link)
    link.received(Lane.CONTROL, one_step(1), Frame(b"", memoryview(bytes(100_000)), receive_s=0.05), 100.0)
    link.received(Lane.BULK, Probe(request=1), Frame(b"", memoryview(bytes(100_000)), receive_s=0.01), 100.0)
    link.answer_beat(Heartbeat(sequence=1, sent_ns=1))
    link.answer_beat(Heartbeat(sequence=2, sent_ns=2))
    assert [message.arrival_bytes_s for message in lanes[Lane.CONTROL].sent] == [pytest.approx(2e6), 0.0]


def test_reported_arrivals_give_the_bandwidth(link: Link) -> None:
    joined(link)
    link.beat(100.0)
    for rate in (2e6, float("nan"), -1.0, float("inf")):
        link.beat_answered(HeartbeatAck(sequence=1, sent_ns=int(99.99 * 1e9), arrival_bytes_s=rate), 100.0)
    assert link.estimate.bandwidth_bytes_s(100.0) == pytest.approx(2e6)
