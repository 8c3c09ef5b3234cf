"""Forged, replayed, malformed and oversized presences, as somebody makes them who can publish at the broker but has no cluster key.

As a program (`forgeries.py HOST PORT COUNT LISTEN_HOST`) it collects the real presences, publishes COUNT forgeries and replays,
and prints as JSON how many it published and how many connections came to the address that the forged ones name.
"""

import asyncio
import base64
import json
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import aiomqtt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.protocol.identity import ClusterKey, peer_id

COLLECT_S = 2.0
AT_ONCE = 100


class Forger:
    """Makes forgeries from real presences: `seen` maps topics to payloads."""

    def __init__(self, seen: dict[str, bytes], address: str, port: int, seed: int = 1) -> None:
        self._seen = list(seen.items())
        self._address, self._port = address, port
        self._random = random.Random(seed)
        self._other_cluster = ClusterKey.generate(os.urandom)

    def make(self, count: int) -> Iterator[tuple[str, bytes]]:
        """Yield topics and payloads, of each kind in turn."""
        kinds = (
            self.replayed,
            self.with_another_body,
            self.of_another_cluster,
            self.with_a_wrong_signature,
            self.under_another_topic,
            self.with_junk,
            self.too_long,
        )
        for number in range(count):
            yield kinds[number % len(kinds)]()

    def replayed(self) -> tuple[str, bytes]:
        return self._random.choice(self._seen)

    def with_another_body(self) -> tuple[str, bytes]:
        """A later date and another address, with the signature of the real one."""
        topic, payload = self._random.choice(self._seen)
        body, certificate, signature = payload.split(b"\n")
        return topic, b"\n".join((self._changed(body), certificate, signature))

    def with_a_wrong_signature(self) -> tuple[str, bytes]:
        topic, payload = self._random.choice(self._seen)
        body, certificate, _ = payload.split(b"\n")
        key = Ed25519PrivateKey.generate()
        changed = self._changed(body)
        return topic, b"\n".join((changed, certificate, base64.b64encode(key.sign(b"meshd/1 presence\n" + changed))))

    def of_another_cluster(self) -> tuple[str, bytes]:
        """A new peer with a key of its own, certified by another cluster's authority."""
        topic, payload = self._random.choice(self._seen)
        key = Ed25519PrivateKey.generate()
        peer = peer_id(key.public_key())
        body = self._changed(payload.split(b"\n")[0], peer=peer)
        certificate = self._other_cluster.certify(key.public_key()).public_bytes(serialization.Encoding.DER)
        lines = (body, base64.b64encode(certificate), base64.b64encode(key.sign(b"meshd/1 presence\n" + body)))
        return f"{topic.rsplit('/', 2)[0]}/{peer}/presence", b"\n".join(lines)

    def under_another_topic(self) -> tuple[str, bytes]:
        topic, payload = self._random.choice(self._seen)
        peer = "".join(self._random.choices("abcdefghijklmnopqrstuvwxyz234567", k=52))
        return f"{topic.rsplit('/', 2)[0]}/{peer}/presence", payload

    def with_junk(self) -> tuple[str, bytes]:
        topic, payload = self._random.choice(self._seen)
        return topic, self._random.choice((b"\xff" * 300, b"{}\n\n", b"[" * 4000, payload[:-10], payload + b"\n", b"\n" * 4000))

    def too_long(self) -> tuple[str, bytes]:
        topic, _ = self._random.choice(self._seen)
        return topic, b"x" * self._random.choice((4097, 70_000))

    def _changed(self, body: bytes, **fields: Any) -> bytes:
        content = json.loads(body)
        content |= {"at": content["at"] + self._random.randrange(1, 200_000), "addresses": [self._address], "port": self._port}
        return json.dumps(content | fields, separators=(",", ":")).encode()


async def collect(host: str, port: int, seconds: float = COLLECT_S) -> dict[str, bytes]:
    """Returns: the retained presences at the broker, by topic."""
    seen: dict[str, bytes] = {}
    async with aiomqtt.Client(host, port, identifier="collector") as client:
        await client.subscribe("meshd/1/+/peer/+/presence")
        try:
            async with asyncio.timeout(seconds):
                async for message in client.messages:
                    if isinstance(message.payload, bytes) and b'"leaves":false' in message.payload:
                        seen[message.topic.value] = message.payload
        except TimeoutError:
            pass
    return seen


async def flood(host: str, port: int, count: int, listen: str) -> dict[str, int]:
    """Publish forgeries. Returns: how many, and how many connections came to the address that they name."""
    connections = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    server = await asyncio.start_server(connected, listen, 0)
    forger = Forger(await collect(host, port), listen, server.sockets[0].getsockname()[1])
    published = 0
    async with aiomqtt.Client(host, port, identifier="forger", max_inflight_messages=AT_ONCE) as client:
        client.pending_calls_threshold = 2 * AT_ONCE
        messages = list(forger.make(count))
        while published < count:
            batch = messages[published : published + AT_ONCE]
            await asyncio.gather(*(client.publish(topic, payload, qos=1, timeout=60) for topic, payload in batch))
            published += len(batch)
            await asyncio.sleep(0.25)  # slowly enough that the broker drops none of them on their way to the daemons
        await asyncio.sleep(3)  # for a connection that the last ones cause
    server.close()
    return {"published": published, "connections": connections}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(flood(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))))
