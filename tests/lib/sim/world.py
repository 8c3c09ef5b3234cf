"""The simulated cluster of one run: its peers and network, and the actions of faults and clients on them."""

import asyncio
import hashlib
import random
from base64 import b32encode
from collections.abc import Coroutine
from typing import Any

from meshd.errors import MeshdError
from meshd.protocol.cluster_key import ClusterKey
from meshd.protocol.owner import OwnerKey
from meshd.protocol.trust import RotationChain, sign_rotation
from meshd.types import PeerId
from sim.checks import Checks
from sim.clients.client import Client, WrongAnswer
from sim.clients.connection import Connection
from sim.health import PeerHealth
from sim.loop import SimLoop
from sim.network.network import SimNetwork
from sim.network.wires import Path
from sim.options import Options
from sim.patches import NumericsNotes
from sim.peer.drafts import Drafts
from sim.peer.peer import SimPeer
from sim.peer.process import PeerSpec, SimProcess
from sim.peer.trust import SimTrustFiles
from sim.toy.backend import Meter, Speed
from sim.toy.mathematics import MIB, toy_card
from sim.trace import Trace


class World:
    """One cluster with its clock, network, trace and random generators."""

    def __init__(self, seed: int, options: Options, *, keep: int = 0, echo: bool = False) -> None:
        self.seed = seed
        self.options = options
        # Each part has its own generator: then an additional draw in one part does not change the numbers of the other parts.
        self.rng_cluster = random.Random(f"{seed}-cluster")
        self.rng_faults = random.Random(f"{seed}-faults")
        self.rng_clients = random.Random(f"{seed}-clients")
        self.loop = SimLoop(random.Random(f"{seed}-threads"))
        self.meter = Meter()
        self.drafts = Drafts(random.Random(f"{seed}-drafts"), options.guesses)
        self.names: dict[PeerId, str] = {}
        self.trace = Trace(self.loop.time, self.names, keep=keep, echo=echo)
        self.network = SimNetwork(self.loop, random.Random(f"{seed}-network"), self.trace)
        self.network.delivery.repeats = options.repeats
        self.network.delivery.width = options.width
        self.cards = tuple(toy_card(6 + number, name=f"toy{number or ''}") for number in range(options.models))
        self.peers: dict[PeerId, SimPeer] = {}
        self.connections: list[Connection] = []
        self.health = PeerHealth(self.loop, self.trace, self.peers, self.cards)
        self.worst = 0.0, ""
        """The longest time that a client waited for a delta, and its client, time and event."""
        self.numerics = NumericsNotes()
        self.checks = Checks(self)
        self.owner = OwnerKey.from_seed(hashlib.sha256(f"{seed}-owner".encode()).digest())
        self.first_key = ClusterKey.generate(random.Random(f"{seed}-key").randbytes, self.owner.hash)
        self.excluded: set[PeerId] = set()
        """Peers that the owner does not list in rotations."""
        for number in range(options.peers):
            self._add_peer(number)

    def _add_peer(self, number: int) -> None:
        """Add a peer with random hardware, and random paths between it and the earlier peers."""
        rng = self.rng_cluster
        identity = b32encode(hashlib.sha256(f"{self.seed}-{number}".encode()).digest()).decode().lower().rstrip("=")
        layer_s = 10 ** rng.uniform(-3.0, -2.1) * self.options.slowness
        spec = PeerSpec(
            id=PeerId(identity),
            name=f"p{number}",
            memory_bytes=rng.choice([300, 400, 600]) * MIB,
            speed=Speed(token_layer_s=layer_s),
            numerics=rng.randrange(self.options.numerics) if self.options.numerics > 1 else 0,
            trust=SimTrustFiles(self.first_key, RotationChain(self.owner.hash)),
            drafts=self.drafts,
            max_sessions=self.options.sessions,
        )
        peer = SimPeer(self.loop, self.network, random.Random(rng.random()), self.meter, spec, self.cards, self.checks)
        for other in self.peers:
            for pair in ((spec.id, other), (other, spec.id)):
                delay = 10 ** rng.uniform(-4, -2)
                self.network.set_path(*pair, Path(delay, delay * rng.random(), 10 ** rng.uniform(6.5, 8.5)))
        self.peers[spec.id] = peer
        self.names[spec.id] = spec.name

    async def rotate(self, process: SimProcess) -> None:
        """Have the owner, at this peer's device, replace the cluster key. All peers stay but those in `excluded`."""
        trust = process.trust
        generation = trust.key.generation + 1
        key = ClusterKey.generate(self.rng_faults.randbytes, self.owner.hash, generation)
        staying = [peer for peer in self.peers if peer not in self.excluded]
        record = sign_rotation(
            self.owner, generation=generation, authority=key.issuer.public, peers=staying, previous=trust.chain.hash, at=0
        )
        self.trace.note("rotation", process.spec.name, generation, len(staying))
        await self.do(process, trust.order(trust.chain.extended(record).encode(), key.secret), 5.0)

    async def some_process(self) -> SimProcess:
        """Return the process of a random peer that runs and is not leaving; wait until there is one."""
        while True:
            processes = [peer.process for peer in self.peers.values() if peer.process is not None and not peer.process.leaving]
            if processes:
                return self.rng_clients.choice(processes)
            await asyncio.sleep(0.5)

    def start(self, peer: SimPeer) -> None:
        """Start a peer, unless it runs already."""
        if peer.process is None:
            peer.start()

    def kill(self, peer: SimPeer, *, silently: bool = False) -> None:
        """Kill a peer and, unless `silently`, break its clients' connections."""
        process = peer.process
        peer.kill(silently=silently)
        self.health.note_loss()
        for connection in list(self.connections):
            if connection.process is process and not silently:
                connection.break_off("connection reset")

    async def stop(self, peer: SimPeer) -> None:
        """Stop a peer as SIGTERM does, then break its clients' connections."""
        process = peer.process
        self.health.note_loss()
        await peer.stop()
        for connection in list(self.connections):
            if connection.process is process:
                connection.break_off("connection closed")

    async def do(self, process: SimProcess, work: Coroutine[Any, Any, Any], within_s: float) -> None:
        """Run a user's command in a peer's context, for at most `within_s`. A MeshdError is no failure: the peer may refuse."""
        task = self.loop.create_task(work, context=process.owner.context())
        await asyncio.wait([task], timeout=within_s)
        task.cancel()
        error = task.exception() if task.done() and not task.cancelled() else None
        if error is not None and not isinstance(error, MeshdError) and not process.killed:
            raise error

    def is_busy(self, peer: SimPeer) -> bool:
        """Return whether the peer has a part in a session."""
        return peer.process is not None and (peer.process.stages.sessions > 0 or self.coordinates(peer))

    def coordinates(self, peer: SimPeer) -> bool:
        """Return whether the peer coordinates a session that has not ended."""
        return peer.process is not None and any(not answer.ended for answer in peer.process.coordinator.answers.values())

    def judge_error(self, client: Client, process: SimProcess, error: MeshdError) -> None:
        """Accept an error in the middle of an answer only if a fault excuses it. Raises: WrongAnswer."""
        if not self.health.excuses_error(process, client.began):
            what = f"client {client.request.number} got {type(error).__name__}"
            raise WrongAnswer(f"{what} though the peers without a fault can hold the model: {error}")

    def note_pause(self, client: Client, pause_s: float) -> None:
        if pause_s > self.worst[0]:
            self.worst = pause_s, f"client {client.request.number} at {self.loop.time():.2f}, event {len(client.request.seen)}"
