import asyncio

import pytest

from meshd.agents.membership.sources import PeerFound, Sighting
from meshd.agents.membership.static import StaticPeers
from meshd.clock import SystemClock
from meshd.values import Address


class CountingClock(SystemClock):
    """Does not sleep, and cancels the task at the third `sleep`."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        if len(self.sleeps) == 3:
            raise asyncio.CancelledError


async def test_static_peers_are_reported_at_every_interval_with_their_unresolved_names() -> None:
    sightings: list[Sighting] = []
    clock = CountingClock()
    source = StaticPeers([Address("attic.lan", 6375), Address("10.0.0.2", 7000)], sightings.append, clock=clock, every_s=7.0)
    with pytest.raises(asyncio.CancelledError):
        await source.run()
    both = [
        PeerFound(source="static", peer=None, addresses=("attic.lan",), port=6375),
        PeerFound(source="static", peer=None, addresses=("10.0.0.2",), port=7000),
    ]
    assert sightings == both * 3
    assert clock.sleeps == [7.0] * 3
