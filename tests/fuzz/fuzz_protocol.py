"""Sends mutated frames to the reader and to a running peer. The first failure ends the run.

    python tests/fuzz/fuzz_protocol.py [--seconds 60] [--seed N]

Required: a stream of bytes gives messages and at most one ProtocolViolation, and how it is cut into chunks makes no difference; the
reader allocates at most one frame; a peer under attack keeps its other links. The printed seed repeats the reader's streams.
"""

import argparse
import asyncio
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from in_process.peers import KEY, QUICK, Peers
from meshd.errors import PeerFault, ProtocolViolation
from meshd.protocol import transport
from meshd.protocol.codec import UnknownMessage, decode, encode
from meshd.protocol.framing import EMPTY, KIB, MIB, FrameLimits, FrameReader
from meshd.protocol.identity import Identity, load_identity
from meshd.protocol.messages import FEATURES, PROTOCOL_VERSION, Heartbeat, Hello, Lane, Message
from meshd.state import StateFolder

GOLDEN = Path(__file__).parents[1] / "protocol" / "golden"
LIMITS = FrameLimits(64 * KIB, MIB)
_EDGES = (0, 1, 7, 8, 0x7F, 0x80, 0xC0, 0xC1, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF)


def mutate(dice: random.Random, frames: list[bytes]) -> bytes:
    """Join up to six of the golden frames to a stream, and damage the stream at up to eight random places."""
    stream = bytearray(b"".join(dice.choices(frames, k=dice.randint(1, 6))))
    for _ in range(dice.choice((0, 1, 1, 2, 8))):
        at = dice.randrange(len(stream))
        match dice.randrange(5):
            case 0:
                stream[at] = dice.choice(_EDGES)
            case 1:
                stream[at] ^= 1 << dice.randrange(8)
            case 2:
                del stream[at : at + dice.randint(1, 40)]
            case 3:
                stream[at:at] = dice.randbytes(dice.randint(1, 40))
            case _:
                stream[at:at] = stream[at : at + dice.randint(1, 80)]
        if not stream:
            return b""
    return bytes(stream)


def read(stream: bytes, sizes: Iterator[int]) -> tuple[list[tuple[Message, bytes]], str]:
    """Read a stream in chunks. Returns: its messages, and the text of the violation that ended it. Empty: no violation."""
    reader = FrameReader(LIMITS)
    bound = reader.held_bytes() + LIMITS.max_header + LIMITS.max_payload + 8
    messages: list[tuple[Message, bytes]] = []
    try:
        while stream:
            buffer = reader.buffer()
            chunk = stream[: min(next(sizes), len(buffer))]
            buffer[: len(chunk)] = chunk
            stream = stream[len(chunk) :]
            for frame in reader.received(len(chunk)):
                messages.append((decode(frame.header), bytes(frame.payload)))  # noqa: PERF401  (messages before a violation are returned too)
            assert reader.held_bytes() <= bound, "the reader allocates more than a frame"
        reader.end()
    except ProtocolViolation as violation:
        return messages, str(violation)
    return messages, ""


def fuzz_reader(dice: random.Random, frames: list[bytes]) -> None:
    """Read one mutated stream in large and in small chunks, and check that both give the same messages."""
    stream = mutate(dice, frames)
    whole = read(stream, iter(lambda: 1 << 30, None))
    chunked = read(stream, iter(lambda: dice.randint(1, 200), None))
    # Compare as text, because NaN is not equal to NaN.
    assert repr(whole) == repr(chunked), "chunking changes what is read"
    for message, _ in whole[0]:
        if not isinstance(message, UnknownMessage):
            assert repr(decode(encode(message))) == repr(message), "a message changes when it is encoded and decoded again"


async def attack(dice: random.Random, frames: list[bytes], hostile: Identity, port: int) -> None:
    """Open one link as a peer that has the cluster key, and break the protocol on it."""
    lanes: list[transport.Connection] = []
    link = dice.getrandbits(63)
    with suppress(PeerFault, TimeoutError):
        for lane in Lane:
            connection = await transport.dial(
                ("127.0.0.1", port), hostile.client, limits=FrameLimits(), now=time.monotonic, connect_s=1.0, handshake_s=1.0
            )
            lanes.append(connection)
            if dice.random() < 0.1:
                connection._transport.write(mutate(dice, frames))
            connection.send(_hello(hostile, link, lane))
            async with asyncio.timeout(1.0):
                await connection.first()
        lanes[0].send(Heartbeat(sequence=1, sent_ns=1))
        dice.choice(lanes)._transport.write(mutate(dice, frames))
        await asyncio.sleep(0.01)
    for connection in lanes:
        connection.abort("attacked enough")


def _hello(identity: Identity, link: int, lane: Lane) -> Hello:
    return Hello(
        version=PROTOCOL_VERSION,
        features=tuple(FEATURES),
        software="fuzz",
        peer=identity.peer,
        name="fuzz",
        incarnation=1,
        link=link,
        lane=lane,
        max_header=64 * KIB,
        max_payload=MIB,
        port=0,
    )


async def fuzz_peer(dice: random.Random, frames: list[bytes], seconds: float) -> int:
    """Attack a running peer for `seconds`. Returns: the number of attacks."""
    attacks = 0
    with tempfile.TemporaryDirectory() as root:
        peers = Peers(Path(root))
        target, friend = peers.start("target", timing=QUICK), peers.start("friend", timing=QUICK)
        hostile = load_identity(StateFolder.open(Path(root) / "hostile"), KEY, os.urandom)
        friend.dial(target)
        await target.next_up()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await attack(dice, frames, hostile, target.port)
            attacks += 1
            assert not target.task.done(), "the peer under attack has stopped"
            assert friend.id in target.links.peers(), "an attack broke another link"
        assert not [event for event in friend.story if event.startswith("down")], "an attack broke another link"
        target.links.send(friend.id, Heartbeat(sequence=1, sent_ns=1), EMPTY)
        await peers.stop()
    return attacks


def main() -> None:
    """Fuzz the reader for half of `--seconds`, then a running peer for as long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    logging.getLogger("meshd").setLevel(logging.CRITICAL)
    frames = [path.read_bytes() for path in sorted(GOLDEN.glob("*.bin"))]
    dice = random.Random(args.seed)
    print(f"seed {args.seed}", flush=True)
    streams, until = 0, time.monotonic() + args.seconds / 2
    while time.monotonic() < until:
        fuzz_reader(dice, frames)
        streams += 1
    attacks = asyncio.run(fuzz_peer(dice, frames, args.seconds / 2))
    print(f"{streams} streams read and {attacks} attacks survived: no failure")


if __name__ == "__main__":
    main()
