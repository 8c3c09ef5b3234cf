"""Peers with real identities and sockets, in one process."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from meshd.agents.links.link_table import Timing
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.open import DialOutcome
from meshd.clock import SystemClock
from meshd.protocol.identity import ClusterKey, Identity, load_identity
from meshd.protocol.messages import Hello
from meshd.protocol.transport import Address
from meshd.state import StateFolder
from meshd.types import PeerId

KEY = ClusterKey(bytes(32))
SLOW = Timing()
QUICK = Timing(heartbeat_s=0.05, silence_s=0.4, handshake_s=0.5, connect_s=0.2)
WAIT_S = 15.0
"""How long a test waits before it fails: a broker that restarts is back within a second or two, on a busy machine in several."""


@dataclass
class Peer:
    """A peer with running links, and the events that the links reported."""

    links: Links
    identity: Identity
    port: int
    task: asyncio.Task[None]
    ups: asyncio.Queue[PeerId] = field(default_factory=asyncio.Queue)
    downs: asyncio.Queue[tuple[PeerId, str]] = field(default_factory=asyncio.Queue)
    story: list[str] = field(default_factory=list)
    outcomes: list[DialOutcome] = field(default_factory=list)
    """The dials of which no link came."""

    @property
    def id(self) -> PeerId:
        return self.identity.peer

    def dial(self, other: "Peer", host: str = "127.0.0.1", source: str = "static") -> None:
        self.links.connect(host, other.port, source)

    async def next_up(self) -> PeerId:
        async with asyncio.timeout(WAIT_S):
            return await self.ups.get()

    async def next_down(self) -> tuple[PeerId, str]:
        async with asyncio.timeout(WAIT_S):
            return await self.downs.get()

    async def stop(self) -> None:
        if not self.task.cancelled():
            await self.links.close("the test is over")
            await self.task

    async def kill(self) -> None:
        """Close all sockets without a goodbye, as the kernel does for a process that is killed."""
        self.task.cancel()
        await asyncio.wait([self.task])


class Peers:
    """Starts peers in the running event loop, and stops them all."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._started: list[Peer] = []

    def start(
        self,
        name: str,
        *,
        key: ClusterKey = KEY,
        timing: Timing = SLOW,
        incarnation: int = 1,
        folder: str = "",
        host: str = "127.0.0.1",
    ) -> Peer:
        identity = load_identity(StateFolder.open(self._root / (folder or name)), key, os.urandom)
        links = Links(
            identity,
            name,
            incarnation,
            LinkSettings(host=host, port=0, timing=timing),
            SystemClock(),
            on_up=lambda peer, hello, address: self._up(started, peer, hello, address),
            on_down=lambda peer, reason: self._down(started, peer, reason),
            on_outcome=lambda outcome: started.outcomes.append(outcome),
        )
        port = links.bind()
        started = Peer(links, identity, port, asyncio.get_running_loop().create_task(links.run()))
        self._started.append(started)
        return started

    async def stop(self) -> None:
        for peer in self._started:
            await peer.stop()

    def _up(self, started: Peer, peer: PeerId, hello: Hello, address: Address) -> None:
        started.story.append(f"up {hello.name}")
        started.ups.put_nowait(peer)

    def _down(self, started: Peer, peer: PeerId, reason: str) -> None:
        started.story.append(f"down: {reason}")
        started.downs.put_nowait((peer, reason))


async def until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Poll until the condition holds. Raises: TimeoutError if it does not within `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for may be in another process
            await asyncio.sleep(0.005)
