"""Which HELLO is accepted, and which of two links survives."""

from typing import Any

import msgspec
import pytest

from meshd.errors import PeerLost, PeerRefused, ProtocolViolation
from meshd.protocol.framing import FrameLimits
from meshd.protocol.handshake import ExistingLink, LinkChoice, check_answer, check_hello, choose_link
from meshd.protocol.messages import PROTOCOL_VERSION, Error, Goodbye, Heartbeat, Hello
from meshd.types import PeerId

SMALL, LARGE = PeerId("a" * 52), PeerId("b" * 52)


def hello(**changes: Any) -> Hello:
    valid = Hello(
        version=PROTOCOL_VERSION,
        features=("f32",),
        software="meshd/0",
        peer=SMALL,
        name="a",
        incarnation=1,
        link=5,
        lane=0,
        max_header=65536,
        max_payload=1 << 24,
        port=6375,
    )
    return msgspec.structs.replace(valid, **changes)


def test_peers_agree_on_the_features_of_both() -> None:
    agreement = check_hello(hello(features=("f32", "int8"), max_header=8192), SMALL, features=("f32", "bf16"))
    assert agreement.features == {"f32"}
    assert agreement.limits == FrameLimits(8192, 1 << 24)


def test_a_higher_minor_version_is_accepted_and_another_major_is_not() -> None:
    major, _ = PROTOCOL_VERSION
    check_hello(hello(version=(major, 9)), SMALL)
    for other in (major - 1, major + 1):
        with pytest.raises(PeerRefused, match=rf"{other}\.0"):
            check_hello(hello(version=(other, 0)), SMALL)


@pytest.mark.parametrize(
    "changes",
    [{"peer": LARGE}, {"lane": 2}, {"lane": -1}, {"max_header": 100}, {"max_header": 1 << 21}, {"max_payload": 1 << 25}],
)
def test_an_invalid_hello_is_a_violation(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        check_hello(hello(**changes), SMALL)


def test_a_connection_begins_with_hello_or_ends() -> None:
    with pytest.raises(ProtocolViolation):
        check_hello(Heartbeat(sequence=1, sent_ns=1), SMALL)
    with pytest.raises(PeerLost, match="there is a link"):
        check_hello(Goodbye(reason="there is a link already"), SMALL)
    with pytest.raises(PeerLost, match="no"):
        check_hello(Error(code="overloaded", message="no room"), SMALL)


def test_the_answer_must_repeat_link_and_lane() -> None:
    check_answer(hello(), hello())
    for changes in ({"link": 6}, {"lane": 1}):
        with pytest.raises(ProtocolViolation):
            check_answer(hello(**changes), hello())


def test_which_of_two_links_survives() -> None:
    def choice(peer: PeerId, own: PeerId, **changes: Any) -> LinkChoice:
        fields = {"incarnation": 1, "dialled": True, "up": True, "silent_s": 0.2} | changes
        return choose_link(ExistingLink(number=7, **fields), hello(peer=peer), own, fresh_s=1.0)

    assert choose_link(None, hello(), LARGE, fresh_s=1.0) is LinkChoice.ACCEPT
    for own, peer in ((SMALL, LARGE), (LARGE, SMALL)):
        assert choice(peer, own, incarnation=2) is LinkChoice.REPLACE
        assert choice(peer, own, dialled=False) is LinkChoice.REPLACE
        assert choice(peer, own) is LinkChoice.REFUSE
        assert choice(peer, own, silent_s=1.5) is LinkChoice.REPLACE
        known = ExistingLink(number=7, incarnation=1, dialled=True, up=True, silent_s=0.2)
        assert choose_link(known, hello(peer=peer, history=3, lost=7), own, fresh_s=1.0) is LinkChoice.REPLACE
        assert choose_link(known, hello(peer=peer, history=3, lost=6), own, fresh_s=1.0) is LinkChoice.REFUSE
    assert choice(SMALL, LARGE, up=False, incarnation=None) is LinkChoice.REPLACE
    assert choice(LARGE, SMALL, up=False, incarnation=None) is LinkChoice.REFUSE


def test_both_sides_keep_the_same_of_two_links_dialled_at_once() -> None:
    dialling = ExistingLink(number=7, incarnation=None, dialled=True, up=False, silent_s=0.0)
    assert choose_link(dialling, hello(peer=LARGE), SMALL, fresh_s=1.0) is LinkChoice.REFUSE
    assert choose_link(dialling, hello(peer=SMALL), LARGE, fresh_s=1.0) is LinkChoice.REPLACE
