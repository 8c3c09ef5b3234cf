"""Peers with real identities and sockets whose cluster key can be rotated, in one process."""

import asyncio
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from in_process.peers import QUICK, until
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.open import DialOutcome
from meshd.agents.observe.events import KeyRotated
from meshd.agents.trust.exchange import TrustExchange
from meshd.agents.trust.files import StateFiles, load_exclusion
from meshd.agents.trust.known_peers import KnownPeers
from meshd.agents.trust.trust import Trust
from meshd.clock import SystemClock
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.identity import load_identity, load_trust, store_cluster_key
from meshd.protocol.messages import Hello
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationRecord, sign_rotation
from meshd.state import StateFolder
from meshd.types import PeerId

CLOCK = SystemClock()


@dataclass
class Member:
    """A peer that runs links and the exchange of rotations."""

    name: str
    folder: StateFolder
    trust: Trust
    links: Links
    exchange: TrustExchange
    events: list[KeyRotated]
    port: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    outcomes: list[DialOutcome] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    downs: list[tuple[PeerId, str]] = field(default_factory=list)
    ups: list[PeerId] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.links.id

    @property
    def generation(self) -> int:
        return self.trust.key.generation

    def dial(self, *others: "Member") -> None:
        for other in others:
            self.links.connect("127.0.0.1", other.port, "static")

    def reasons(self) -> str:
        return " | ".join(outcome.reason for outcome in self.outcomes)

    async def stop(self) -> None:
        await self.links.close("the test is over")
        for task in self.tasks[1:]:
            task.cancel()
        await asyncio.wait(self.tasks)


class Club:
    """A cluster with an owner key, and its members."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.owner = OwnerKey.from_seed(os.urandom(32))
        self.first_key = ClusterKey.generate(os.urandom, self.owner.hash)
        self.members: list[Member] = []

    def start(self, name: str, key: ClusterKey | None = None, port: int = 0) -> Member:
        """Start a peer from its folder, or with `key` (default: the first key) if it has none."""
        folder = StateFolder.open(self.root / name)
        if load_trust(folder) is None:
            store_cluster_key(folder, key or self.first_key)
        stored = load_trust(folder)
        assert stored is not None
        identity = load_identity(folder, stored[0], os.urandom)
        known = KnownPeers(folder, CLOCK)
        trust = Trust(identity.peer, *stored, StateFiles(folder, CLOCK), known, exclusion=load_exclusion(folder, stored[0]))
        member: Member

        def up(peer: PeerId, hello: Hello, address: tuple[str, int]) -> None:
            member.ups.append(peer)
            member.exchange.on_up(peer, hello, address)

        def down(peer: PeerId, reason: str) -> None:
            member.downs.append((peer, reason))
            member.exchange.on_down(peer, reason)

        links = Links(
            identity,
            name,
            int.from_bytes(os.urandom(7), "big"),
            LinkSettings(host="127.0.0.1", port=port, timing=QUICK),
            CLOCK,
            on_up=up,
            on_down=down,
            on_outcome=lambda outcome: member.outcomes.append(outcome),
        )

        def notify(message: str, hint: str = "", about: str = "") -> None:
            member.notices.append(message)

        events: list[KeyRotated] = []
        exchange = TrustExchange(trust, links, CLOCK, notify, lambda about: None, events.append)
        member = Member(name, folder, trust, links, exchange, events)
        exchange.register()
        member.port = links.bind()
        loop = asyncio.get_running_loop()
        member.tasks = [loop.create_task(links.run()), loop.create_task(exchange.run()), loop.create_task(known.run())]
        self.members.append(member)
        return member

    async def together(self, *members: Member) -> None:
        """Link all of them."""
        for index, member in enumerate(members):
            member.dial(*members[index + 1 :])
        await until(lambda: all(linked(one, other) for one in members for other in members if one is not other))

    def record(
        self,
        at: Member,
        staying: Iterable[PeerId],
        *,
        owner: OwnerKey | None = None,
        new_owner: OwnerKey | None = None,
        generation: int | None = None,
    ) -> tuple[RotationRecord, ClusterKey]:
        """Sign a rotation that follows the newest one that `at` knows."""
        generation = generation or at.trust.key.generation + 1
        key = ClusterKey.generate(os.urandom, self.first_key.owner, generation)
        record = sign_rotation(
            owner or self.owner,
            generation=generation,
            authority=key.issuer.public,
            peers=staying,
            previous=at.trust.chain.hash,
            at=int(time.time()),
            new_owner=new_owner.public if new_owner is not None else None,
        )
        return record, key

    async def rotate(self, at: Member, *staying: Member, new_owner: OwnerKey | None = None, generation: int | None = None) -> None:
        """Have the owner's device `at` rotate the key."""
        record, key = self.record(at, [at.id, *(member.id for member in staying)], new_owner=new_owner, generation=generation)
        await at.trust.order(at.trust.chain.extended(record).encode(), key.secret)
        self.owner = new_owner or self.owner

    def copy_of(self, member: Member, name: str) -> StateFolder:
        """Copy a member's folder, with the right identity: what a thief has."""
        shutil.copytree(member.folder.path, self.root / name)
        copied = StateFolder.open(self.root / name)
        data = copied.read("identity.key")
        assert data is not None
        copied.write("identity.key", data.partition(b"\n")[2])
        return copied

    async def stop(self) -> None:
        for member in self.members:
            await member.stop()


def linked(one: Member, other: Member) -> bool:
    return other.id in one.links.peers()
