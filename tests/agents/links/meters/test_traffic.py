"""The bytes of links: by what they carry, and of links that have ended."""

from in_process.frames import one_step
from meshd.agents.links.meters.traffic import MAX_PEERS, Traffic
from meshd.protocol.messages import PeerEvents
from meshd.types import PeerId


def test_payloads_are_counted_by_what_they_carry() -> None:
    traffic = Traffic()
    traffic.count_sent(one_step(1), 100)
    traffic.count_sent(one_step(1), 20)
    traffic.count_received(PeerEvents(lost=0), 7)
    assert (traffic.sent["activations"], traffic.sent["events"]) == (120, 0)
    assert (traffic.received["activations"], traffic.received["events"]) == (0, 7)


def test_bytes_of_ended_links_add_up_for_each_peer() -> None:
    traffic = Traffic()
    traffic.ended(PeerId("a"), 10, 1)
    traffic.ended(PeerId("b"), 5, 5)
    traffic.ended(PeerId("a"), 100, 2)
    assert traffic.before(PeerId("a")) == (110, 3)
    assert traffic.before(PeerId("c")) == (0, 0)


def test_the_number_of_peers_is_bounded() -> None:
    traffic = Traffic()
    for number in range(2 * MAX_PEERS):
        traffic.ended(PeerId(f"p{number}"), 1, 1)
    assert traffic.before(PeerId("p0")) == (0, 0)
    assert traffic.before(PeerId(f"p{2 * MAX_PEERS - 1}")) == (1, 1)
    assert len(traffic._ended) == MAX_PEERS
