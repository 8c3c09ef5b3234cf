"""The agents of one peer: which messages have handlers, and which agent gets a message first."""

import pytest

from meshd.agents.session.coordinator import Coordinator
from meshd.agents.stage.host import StageHost
from meshd.peer.compose import compose
from meshd.peer.parts import Parts
from meshd.protocol.messages import REGISTRY, Error, Goodbye, Heartbeat, HeartbeatAck, Hello, Probe, Received, Reply
from meshd.types import PeerId

SENDER = PeerId("a" * 52)
LINK_LEVEL = {Hello, Heartbeat, HeartbeatAck, Goodbye, Probe, Received}
"""Messages that links handle without an agent."""


async def test_every_message_of_the_protocol_has_a_handler(parts: Parts) -> None:
    peer = compose(parts)
    peer.register()
    handled = []
    for message_type in REGISTRY.values():
        if message_type in LINK_LEVEL or (issubclass(message_type, Reply) and message_type is not Error):
            continue
        with pytest.raises(ValueError, match="has a handler already"):
            peer.links.register(message_type, lambda *_: None)
        handled.append(message_type)
    assert len(handled) > 20


async def test_the_stages_get_tokens_before_the_coordinator(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for agent in (Coordinator, StageHost):
        monkeypatch.setattr(agent, "on_tokens", lambda self, *_: order.append(type(self).__name__))
    peer = compose(parts)
    peer._on_tokens(SENDER, None, memoryview(b""))  # type: ignore[arg-type]
    assert order == ["StageHost", "Coordinator"]
