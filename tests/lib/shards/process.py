"""A holder in another process, with answers that are late, out of order, repeated or missing."""

import asyncio
import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from meshd.errors import MeshdError
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import AttendRequest, RemoteRun
from meshd.protocol.messages import Open
from meshd.types import ModelSpec, PeerId
from shards.clients import HOLDERS
from shards.holders import HALVES, Holders

Answer = Callable[[Part | MeshdError], None]


@dataclass(frozen=True)
class Manner:
    """How the process answers."""

    delay_ms: float = 0.0
    """From a request's arrival to its answer, if computing it takes no longer."""
    shuffled: bool = False
    """Each answer takes another time, up to `delay_ms`, so that they come out of order."""
    times: int = 1
    """How often each answer is sent. 0: never."""


def _serve(pipe: Connection, spec: ModelSpec, capacity: int) -> None:
    """Answer requests until the pipe closes. A request is computed when it comes, and its answer is sent when it is due."""
    holders, dice = Holders(spec, capacity), random.Random(1)
    pipe.send("ready")
    due: list[tuple[float, int, Part]] = []
    while True:
        now = time.monotonic()
        for item in sorted((each for each in due if each[0] <= now), key=lambda each: each[0]):
            due.remove(item)
            pipe.send(item[1:])
        if not pipe.poll(max(0.0, min((at for at, *_ in due), default=now + 1.0) - time.monotonic())):
            continue
        try:
            number, session, request, manner = pipe.recv()
        except EOFError:
            return
        at = time.monotonic() + manner.delay_ms / 1000 * (dice.random() if manner.shuffled else 1.0)
        part = holders.answer(session, request)
        due += [(at + 0.001 * again, number, part) for again in range(manner.times)]


@dataclass(repr=False)  # pytest prints fixtures, and the callbacks hold whole batches
class ShardProcess:
    """A process that holds runs of sessions, and its clients in this process."""

    pipe: Connection
    manner: Manner = field(default_factory=Manner)
    answers: int = 0
    """Number of answers that have come back, repeated ones included."""
    in_order: bool = True
    _waiting: dict[int, Answer] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _newest: int = -1

    def attach(self) -> None:
        """Read answers on the running event loop."""
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self._read)

    def detach(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pipe.fileno())
        while self.pipe.poll(0.1):  # answers that nobody waited for
            self.pipe.recv()
        self._waiting.clear()

    def client(self, message: Open) -> "ProcessClient":
        """Make the client of a session; takes the place of `StageHost.shards_of`."""
        return ProcessClient(self, f"{message.session} {message.epoch} {message.stage}")

    def send(self, session: str, request: AttendRequest, answer: Answer) -> None:
        number = next(self._numbers)
        self._waiting[number] = answer
        self.pipe.send((number, session, request, self.manner))

    def _read(self) -> None:
        while self.pipe.poll():
            number, part = self.pipe.recv()
            self.answers += 1
            self.in_order = self.in_order and number >= self._newest
            self._newest = max(self._newest, number)
            self._waiting[number](part)


@dataclass
class ProcessClient:
    """Implements `ShardClient` for one session."""

    process: ShardProcess
    session: str
    runs: tuple[RemoteRun, ...] = HALVES

    def holder_of(self, run: RemoteRun) -> PeerId:
        return HOLDERS[self.runs.index(run)]

    def ask(self, request: AttendRequest, answer: Answer) -> None:
        self.process.send(self.session, request, answer)


@contextmanager
def shard_process(spec: ModelSpec, capacity: int) -> Iterator[ShardProcess]:
    """Run a holder of `capacity` tokens of each session in another process."""
    context: Any = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=_serve, args=(other, spec, capacity), daemon=True)
    process.start()
    other.close()
    try:
        assert own.recv() == "ready"
        yield ShardProcess(own)
    finally:
        own.close()
        process.join(5)
        process.kill()
