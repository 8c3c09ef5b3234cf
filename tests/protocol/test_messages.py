"""The registry of messages and what all messages have in common."""

import msgspec
import pytest

from meshd.protocol.messages import REGISTRY, Heartbeat, Lane, Message, Reply, Request, SessionMessage
from meshd.protocol.messages.base import message


def _subclasses(kind: type[Message]) -> list[type[Message]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _subclasses(child))]


@pytest.mark.parametrize("kind", REGISTRY.values())
def test_a_message_has_its_number_and_is_immutable(kind: type[Message]) -> None:
    assert REGISTRY[kind.number] is kind
    assert kind.__struct_config__.frozen
    assert not kind.__struct_config__.forbid_unknown_fields  # a reader skips the fields of a newer writer


def test_every_message_of_the_modules_is_registered() -> None:
    bases = {Message, Request, Reply, SessionMessage}
    found = {kind for kind in _subclasses(Message) if kind.__module__.startswith("meshd.protocol.messages")}
    assert found - bases == set(REGISTRY.values())


def test_a_type_number_that_is_taken_is_refused() -> None:
    class Other(Message, frozen=True, kw_only=True):
        pass

    with pytest.raises(ValueError, match="taken by Heartbeat"):
        message(Heartbeat.number)(Other)
    assert REGISTRY[Heartbeat.number] is Heartbeat


def test_requests_and_replies_have_a_request_number_and_no_epoch() -> None:
    for kind in REGISTRY.values():
        assert not (issubclass(kind, Request | Reply) and issubclass(kind, SessionMessage)), kind
        assert issubclass(kind, Request | Reply) == ("request" in kind.__struct_fields__), kind


def test_the_control_lane_is_the_default() -> None:
    assert Heartbeat.default_lane is Lane.CONTROL
    assert {kind.default_lane for kind in REGISTRY.values()} == {Lane.CONTROL, Lane.BULK}


def test_a_message_needs_its_fields() -> None:
    with pytest.raises(msgspec.ValidationError, match="sent_ns"):
        msgspec.convert({"sequence": 1}, Heartbeat)
