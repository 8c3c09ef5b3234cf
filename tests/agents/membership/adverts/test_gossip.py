"""Addresses from other peers' statuses are hints with a budget, per sender and in all."""

import pytest

from meshd.agents.membership.adverts.gossip import AGAIN_S, IN_ALL_AT_ONCE, PER_SENDER_AT_ONCE, GossipBudget
from meshd.types import PeerId
from meshd.values import Address

SENDER = PeerId("s" * 52)
STRANGER = PeerId("c" * 52)


def invented(count: int, start: int = 0) -> dict[PeerId, str]:
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    ids = [PeerId("".join(letters[(number >> (5 * place)) & 31] for place in range(52))) for number in range(start, start + count)]
    return {peer: f"10.0.{number % 250}.7:{7000 + number}" for number, peer in enumerate(ids)}


def test_a_peer_that_joins_learns_of_a_whole_cluster_from_one_status() -> None:
    assert len(GossipBudget().choose(SENDER, invented(64), 1.0)) == 64


def test_one_sender_brings_few_hints_after_its_first() -> None:
    gossip = GossipBudget()
    used = [len(gossip.choose(SENDER, invented(64, 64 * each), 1.0 + each / 20)) for each in range(200)]
    assert sum(used) <= PER_SENDER_AT_ONCE + 10


def test_all_senders_together_have_a_budget() -> None:
    gossip = GossipBudget()
    used = [len(gossip.choose(PeerId(f"{sender:052d}"), invented(64, 64 * sender), 1.0)) for sender in range(100)]
    assert sum(used) == IN_ALL_AT_ONCE


def test_a_new_link_of_the_sender_does_not_bring_the_same_hints_again() -> None:
    gossip = GossipBudget()
    gossip.choose(SENDER, invented(10), 1.0)
    gossip.forget(SENDER)
    assert gossip.choose(SENDER, invented(10), 2.0) == []
    assert len(gossip.choose(SENDER, invented(10), 1.0 + AGAIN_S)) == 10


@pytest.mark.parametrize(
    "address",
    ["", "no port", "10.0.0.7:0", "10.0.0.7:99999", ":", "box.lan:6375", "224.0.0.251:5353", "0.0.0.0:6375", "1" * 9999 + ":1"],
)
def test_a_hint_without_the_address_of_one_host_is_not_used(address: str) -> None:
    gossip = GossipBudget()
    assert gossip.choose(SENDER, {STRANGER: address}, 1.0) == []
    assert gossip.choose(SENDER, {PeerId("not an id"): "10.0.0.7:6375"}, 1.0) == []
    assert gossip.choose(SENDER, {STRANGER: "[fe80::1]:6375"}, 1.0) == [(STRANGER, Address("fe80::1", 6375))]
