"""Sends well-formed messages with hostile values to real daemons that answer requests. The first failure ends the run.

    python tests/fuzz/fuzz_values.py [--seconds 60 | --messages N] [--seed N] [--keep DIR]

Messages are made from their types: values at the bounds of each field, out of bounds, unknown ids and those of running sessions,
wrong layers, older and newer epochs, repeated and out of order. A third of the time they are decoded in this process, a third they
are sent by a member of the cluster, and a third by strangers without the cluster's key.

Required: a message is decoded, or is one ProtocolViolation; no daemon ends or logs an exception that it did not foresee; links
between other peers stay up; answers equal those without an attack; the daemons' memory does not grow.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import shutil
import ssl
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import msgspec

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from hostile_values import MessageMaker
from in_process.clusters import make_card
from meshd.agents.links.links import Links, LinkSettings
from meshd.clock import SystemClock
from meshd.config import Settings
from meshd.errors import MeshdError, ProtocolViolation
from meshd.protocol.codec import decode, encode
from meshd.protocol.framing import frame_head
from meshd.protocol.identity import ClusterKey, load_identity
from meshd.protocol.messages import Drain, Goodbye, Hello, Journal, Lane, Message, Place, Unplace
from meshd.state import StateFolder
from meshd.types import LayerRange, ModelId, PeerId
from real_daemons.cluster import MODEL, Cluster, Daemon

PROMPT, TOKENS = "Once upon a time there was a", 24
MAX_GROWTH = 256 << 20
"""Bytes that a daemon may have more after the attack: its buffers, caches and records, all of which are bounded."""
FILLED_S, MAX_GROWTH_FILLED = 90.0, 24 << 20
"""Time until these are full, and the bytes that a daemon may have more at the end than then: there is no steady growth."""
_BURST = 24
_QUEUE_BYTES = 1 << 20
_RANGES = [
    LayerRange(*span) for span in ((0, 12), (12, 30), (0, 30), (0, 1), (29, 30), (30, 31), (5, 1024), (1023, 1024), (0, 1024))
]
_UNKNOWN = "0badc0de" * 4
_PLACED = "a:0-12,b:12-30"


@dataclass
class Honest:
    """Another member's clients: they repeat one request at both daemons, and compare the answers."""

    daemons: list[Daemon]
    expected: str = ""
    right: int = 0
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def ask(self, daemon: Daemon) -> str:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "mesh": {"stages": _PLACED}}
        text: str = daemon.post("/v1/completions", body, 120.0)["choices"][0]["text"]
        return text

    def begin(self) -> None:
        self.expected = self.ask(self.daemons[0])
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(180)

    def _repeat(self) -> None:
        turn = 0
        while not self._stop.is_set():
            daemon = self.daemons[turn % len(self.daemons)]
            turn += 1
            try:
                text = self.ask(daemon)
            except OSError as error:
                self.failures.append(f"{daemon.name}: {error}")
                continue
            if text == self.expected:
                self.right += 1
            else:
                self.failures.append(f"{daemon.name} answered {text!r}, not {self.expected!r}")


def rss(daemon: Daemon) -> int:
    """Returns: the daemon's resident memory in bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def spoilt_frame(maker: MessageMaker, dice: random.Random) -> bytes:
    number, body = maker.spoilt()
    header = msgpack.packb([number, body])
    payload = dice.randbytes(dice.choice((0, 0, 7)))
    return frame_head(header, len(payload)) + header + payload


def decode_in_process(maker: MessageMaker, seconds: float) -> Counter[str]:
    """Decode messages that are within and out of bounds. Raises: what `decode` raises besides ProtocolViolation."""
    outcomes: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number, body = maker.body() if outcomes.total() % 2 else maker.spoilt()
        try:
            message = decode(msgpack.packb([number, body]))
        except ProtocolViolation:
            outcomes["refused"] += 1
        else:
            outcomes["decoded"] += 1
            assert repr(decode(encode(message))) == repr(message)
    return outcomes


class Member:
    """A member of the cluster that sends hostile messages over the product's own links."""

    def __init__(self, dice: random.Random, maker: MessageMaker, folder: Path, key: ClusterKey) -> None:
        self._dice = dice
        self._maker = maker
        identity = load_identity(StateFolder.open(folder), key, os.urandom)
        clock = SystemClock()
        incarnation = dice.getrandbits(60)
        settings = LinkSettings(host="127.0.0.1", port=0)
        self.links = Links(identity, "evil", incarnation, settings, clock, self._up, self._down, lambda text: None)
        self.links.register(Journal, self._on_journal)
        self.violations = 0
        self.lost = 0
        self._sent: list[tuple[Message, bytes]] = []
        self.kinds: Counter[str] = Counter()

    def _up(self, peer: PeerId, hello: Hello, address: Any) -> None:
        known = self._maker.known
        known["PeerId"] = list({*known["PeerId"], peer, self.links.id})

    def _down(self, peer: PeerId, reason: str) -> None:
        self.lost += 1

    def _on_journal(self, sender: PeerId, message: Journal, payload: memoryview) -> None:
        """Learn the ids of running sessions, as a deputy does."""
        sessions = self._maker.known["SessionId"]
        sessions.append(message.session)
        del sessions[1:-6]

    async def attack(self, targets: list[Daemon], seconds: float, messages: int | None, spoil_every: int) -> int:
        """Send messages until the time is over or `messages` are sent. Returns: how many were sent."""
        async with asyncio.TaskGroup() as group:
            running = group.create_task(self.links.run())
            await asyncio.sleep(0.1)
            for daemon in targets:
                host, _, port = daemon.link.rpartition(":")
                self.links.connect(host, int(port), "static")
            sent, until = 0, time.monotonic() + seconds
            while (sent < messages) if messages else time.monotonic() < until:
                peers = self.links.peers()
                if not peers:
                    await asyncio.sleep(0.02)
                    continue
                sent += await self._burst(self._dice.choice(peers))
                if self._dice.random() < _BURST / spoil_every:
                    sent += self._break_protocol(self._dice.choice(peers))
            await self.links.close("attacked enough")
            running.cancel()
        return sent

    async def _burst(self, peer: PeerId) -> int:
        """Send some messages that are within their bounds, in any order, some twice."""
        link = self.links._table.get(peer)
        sent = 0
        while link is not None and link.queued_bytes > _QUEUE_BYTES and not link.gone.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for _ in range(_BURST):
            message, payload = self._next()
            with contextlib.suppress(MeshdError):
                self.links.send(peer, message, payload)
                sent += 1
        await asyncio.sleep(0)
        return sent

    def _next(self) -> tuple[Message, bytes]:
        dice = self._dice
        if self._sent and dice.random() < 0.1:
            return dice.choice(self._sent)
        message = harmless(self._maker.message())
        while isinstance(message, Hello | Goodbye):  # both end this link
            message = harmless(self._maker.message())
        self.kinds[type(message).__name__] += 1
        self._sent.append((message, self._payload(message)))
        del self._sent[:-64]
        return self._sent[-1]

    def _payload(self, message: Message) -> bytes:
        dice = self._dice
        size = getattr(message, "tokens", 0)
        width = dice.choice((4, 576 * 4, 12 * 2 * 192 * 4, 18 * 2 * 192 * 4))
        fitting = size * width if isinstance(size, int) and 0 < size * width <= 300_000 else 0
        return dice.randbytes(dice.choice((0, 0, 1, 4, 2304, fitting)))

    def _break_protocol(self, peer: PeerId) -> int:
        """Send a message that is out of bounds: the receiver closes this link, and no other."""
        link = self.links._table.get(peer)
        if link is None or not link.up or len(link.lanes) < len(Lane):
            return 0
        link.lanes[self._dice.choice(list(Lane))]._transport.write(spoilt_frame(self._maker, self._dice))
        self.violations += 1
        return 1


def harmless(message: Message) -> Message:
    """Change an order that any member may give, and that loads, frees or drains on purpose, into one that changes nothing."""
    if isinstance(message, Place | Unplace):
        return msgspec.structs.replace(message, model=ModelId(_UNKNOWN))
    if isinstance(message, Drain):
        return msgspec.structs.replace(message, undo=True)
    return message


class Strangers:
    """Connections without the cluster's key."""

    def __init__(self, dice: random.Random, maker: MessageMaker, folder: Path) -> None:
        self._dice = dice
        self._maker = maker
        self._wrong = load_identity(StateFolder.open(folder), ClusterKey(dice.randbytes(32)), os.urandom).client
        self._open = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._open.check_hostname = False
        self._open.verify_mode = ssl.CERT_NONE
        self._half_open: list[asyncio.StreamWriter] = []
        self.kinds: Counter[str] = Counter()

    async def attack(self, targets: list[Daemon], seconds: float, messages: int | None) -> int:
        """Connect until the time is over or `messages` are sent. Returns: how many were sent."""
        sent, until = 0, time.monotonic() + seconds
        while (sent < messages) if messages else time.monotonic() < until:
            found = await asyncio.gather(*(self._connect(self._dice.choice(targets)) for _ in range(8)))
            sent += sum(found)
        for writer in self._half_open:
            writer.close()
        return sent

    async def _connect(self, daemon: Daemon) -> int:
        """Open one connection and send some messages. Returns: how many."""
        host, _, port = daemon.link.rpartition(":")
        kind = self._dice.choice(("plain", "plain", "junk", "no certificate", "other key", "half open"))
        self.kinds[kind] += 1
        context = {"no certificate": self._open, "other key": self._wrong}.get(kind)
        count = self._dice.randint(1, 30)
        data = b"".join(spoilt_frame(self._maker, self._dice) if kind != "junk" else self._dice.randbytes(60) for _ in range(count))
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(3.0):
                reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
                if kind == "half open":
                    self._half_open.append(writer)
                    for old in self._half_open[:-40]:
                        old.close()
                    del self._half_open[:-40]
                    return 1
                writer.write(data)
                await writer.drain()
                await reader.read(1 << 16)
                writer.close()
        return count


@dataclass
class Watch:
    """What must not change while messages arrive: processes, memory, links, logs."""

    daemons: list[Daemon]
    before: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    """The most bytes in the first `FILLED_S`."""
    began: float = 0.0
    _ids: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        self.before = {daemon.name: rss(daemon) for daemon in self.daemons}
        self.most = dict(self.before)
        self.filled = dict(self.before)
        self.began = time.monotonic()
        self._ids = {daemon.name: str(daemon.get("/mesh/v1/self")["id"]) for daemon in self.daemons}

    def sample(self) -> None:
        for daemon in self.daemons:
            assert daemon.process.poll() is None, f"{daemon.name} has ended: {tail(daemon)}"
            self.most[daemon.name] = max(self.most[daemon.name], rss(daemon))
        if time.monotonic() - self.began < FILLED_S:
            self.filled = dict(self.most)

    def check(self) -> str:
        """Check the state after an attack. Returns: the figures."""
        self.sample()
        for daemon in self.daemons:
            log = daemon.log.read_text(errors="replace")
            links = (f"the link with {other[:8]} {end}" for other in self._ids.values() for end in ("is down", "has ended"))
            for mark in ("Traceback", "unexpected error", "could not be handled", *links):
                assert mark not in log, f"{daemon.name} met an exception: {log[max(0, log.index(mark) - 600) :][:2500]}"
            grown = rss(daemon) - self.before[daemon.name]
            assert grown < MAX_GROWTH, f"{daemon.name} takes {grown >> 20} MiB more than before"
            grown = rss(daemon) - self.filled[daemon.name]
            assert grown < MAX_GROWTH_FILLED, f"{daemon.name} takes {grown >> 20} MiB more than after {FILLED_S:.0f} s"
        return "; ".join(
            f"{daemon.name} {self.before[daemon.name] >> 20} -> {rss(daemon) >> 20} MiB (at most {self.filled[daemon.name] >> 20} "
            f"in the first {FILLED_S:.0f} s, {self.most[daemon.name] >> 20} in all), "
            f"log {daemon.log.stat().st_size >> 10} KiB"
            for daemon in self.daemons
        )


def tail(daemon: Daemon) -> str:
    return daemon.log.read_text(errors="replace")[-3000:]


async def watched(watch: Watch, attack: Any) -> int:
    """Run an attack, and sample the daemons each second meanwhile."""
    running = asyncio.ensure_future(attack)
    try:
        while not running.done():
            await asyncio.wait({running}, timeout=1.0)
            watch.sample()
    finally:
        running.cancel()
    sent: int = await running
    return sent


def fuzz_daemons(args: argparse.Namespace, dice: random.Random, maker: MessageMaker, root: Path) -> None:
    """Attack two daemons, first as a member, then as strangers."""
    cluster = Cluster(root, Settings()["cache"].value, forked=False)
    try:
        cluster.start("a", "b")
        cluster.see_each_other()
        cluster.place("a", stages=_PLACED)
        daemons = list(cluster.daemons.values())
        maker.known["ModelId"] = [row["id"] for row in daemons[0].rows("models")] + [_UNKNOWN]
        honest = Honest(daemons)
        honest.begin()
        key = ClusterKey.from_code(cluster.key(daemons[0]))
        member = Member(dice, maker, root / "evil", key)
        strangers = Strangers(dice, maker, root / "stranger")
        attacks = (
            ("a member", lambda: member.attack(daemons, args.seconds / 3, args.messages, args.spoil_every)),
            ("strangers", lambda: strangers.attack(daemons, args.seconds / 3, args.messages and args.messages // 2)),
        )
        time.sleep(2.0)
        for name, attack in attacks:
            watch, right = Watch(daemons), honest.right
            watch.begin()
            began = time.monotonic()
            sent = asyncio.run(watched(watch, attack()))
            took = time.monotonic() - began
            figures = watch.check()
            print(
                f"{name}: {sent} messages in {took:.0f} s, {sent / took:.0f} a second; {honest.right - right} answers; {figures}",
                flush=True,
            )
        honest.end()
        print(f"closed links of the member: {member.lost}, for {member.violations} messages out of bounds; {dict(strangers.kinds)}")
        assert not honest.failures, (
            f"{len(honest.failures)} of {honest.right + len(honest.failures)} answers failed: {honest.failures[:4]}"
        )
        assert honest.right, "no honest request was answered"
    except BaseException:
        for daemon in cluster.daemons.values():
            print(f"--- the end of {daemon.name}'s log\n{tail(daemon)[-1500:]}", file=sys.stderr)
        raise
    finally:
        cluster.close()


def main() -> None:
    """Decode in this process for a third of `--seconds`, then attack daemons as a member and as strangers for as long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--messages", type=int, help="messages of the member; strangers send half as many; replaces --seconds there"
    )
    parser.add_argument("--spoil-every", type=int, default=400, help="each this many messages of the member, one is out of bounds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--keep", type=Path, help="folder for the daemons' state and logs, which is not deleted")
    args = parser.parse_args()
    for name in ("meshd", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    print(f"seed {args.seed}", flush=True)
    dice = random.Random(args.seed)
    ids = {"PeerId": ["a" * 52], "SessionId": [_UNKNOWN], "ModelId": [_UNKNOWN]}
    maker = MessageMaker(dice, ids | {"LayerRange": list(_RANGES), "ModelCard": [make_card(30), make_card(1)]})
    outcomes = decode_in_process(maker, args.seconds / 3)
    print(f"{outcomes.total()} messages decoded in this process ({dict(outcomes)})", flush=True)
    root = args.keep or Path(tempfile.mkdtemp(prefix="meshd-fuzz-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        fuzz_daemons(args, dice, maker, root)
    finally:
        if not args.keep:
            shutil.rmtree(root, ignore_errors=True)
    print("no failure")


if __name__ == "__main__":
    main()
