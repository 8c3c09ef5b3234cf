"""Asks a meshd cluster a question over MQTT, as a device that speaks nothing else. A reference for docs/fleet.md.

It needs the packages aiomqtt and cryptography, and nothing of meshd:

    python mqtt_device.py BROKER_HOST PORT device.json MODEL "Why is the sky blue?"

`device.json` is the output of `meshd key mqtt add NAME --json`.
"""

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SILENCE_S = 10.0
"""A peer from which nothing comes for so long is given up. It does not answer a request that it refuses, either."""
_HEAD = struct.Struct(">BI16s")


class JobFailed(Exception):
    """The cluster answered with an error."""


@dataclass
class Device:
    """A device with its key."""

    name: str
    cluster: str
    serial: bytes
    key: bytes
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The newest presence of each peer. A device can't check it, and need not: only members can open its requests."""

    @classmethod
    def from_json(cls, text: str) -> "Device":
        given = json.loads(text)
        return cls(given["name"], given["cluster"], bytes.fromhex(given["serial"]), bytes.fromhex(given["key"]))

    def note_presence(self, payload: bytes) -> None:
        presence = json.loads(payload.split(b"\n")[0])
        known = self.peers.get(presence["peer"])
        if presence["leaves"]:
            if known is not None and known["since"] == presence["since"]:
                del self.peers[presence["peer"]]
        elif known is None or presence["at"] > known["at"]:
            self.peers[presence["peer"]] = presence | {"heard": time.monotonic()}

    def seal(self, peer: dict[str, Any], job: bytes, seq: int, content: dict[str, Any]) -> bytes:
        box = self._cipher("request", peer, job, self.serial).encrypt(
            seq.to_bytes(12, "big"), json.dumps(content).encode(), self._associated("request", peer, job, seq)
        )
        return _HEAD.pack(1, seq, self.serial) + box

    def open(self, peer: dict[str, Any], job: bytes, payload: bytes) -> tuple[int, dict[str, Any]]:
        """Return number and content of a chunk. Raises: InvalidTag, ValueError, struct.error if it is forged or malformed."""
        version, seq, salt = _HEAD.unpack_from(payload)
        if version != 1:
            raise ValueError(f"a chunk of version {version}")
        plain = self._cipher("answer", peer, job, salt).decrypt(
            seq.to_bytes(12, "big"), payload[_HEAD.size :], self._associated("answer", peer, job, seq)
        )
        content: dict[str, Any] = json.loads(plain)
        return seq, content

    def _cipher(self, direction: str, peer: dict[str, Any], job: bytes, salt: bytes) -> ChaCha20Poly1305:
        info = f"meshd/1 job {direction}\n{peer['peer']}".encode()
        return ChaCha20Poly1305(HKDF(algorithm=hashes.SHA256(), length=32, salt=job + salt, info=info).derive(self.key))

    def _associated(self, direction: str, peer: dict[str, Any], job: bytes, seq: int) -> bytes:
        fields = ("meshd/1 job", direction, self.cluster, peer["peer"], self.name, job.hex(), peer["since"], seq)
        return "\n".join(map(str, fields)).encode()


class Asker:
    """Asks the peers at one broker."""

    def __init__(self, device: Device, client: aiomqtt.Client, silence_s: float = SILENCE_S) -> None:
        self._device = device
        self._client = client
        self._silence_s = silence_s
        self.asked: list[str] = []
        """Ids of the peers that were asked, in order."""

    async def ask(self, **request: Any) -> AsyncIterator[str]:
        """Yield the text of the answer as it comes. If a peer falls silent or leaves, another one goes on. Raises: JobFailed."""
        root = f"meshd/1/{self._device.cluster}"
        await self._client.subscribe(f"{root}/peer/+/presence")
        await self._client.subscribe(f"{root}/device/{self._device.name}/+", qos=1)
        text, answer, tries = "", "", 0
        while tries < 10:
            peer = await self._choose()
            again = ""
            try:
                async for content in self._job(peer, {"resume": answer} if answer else request):
                    if "error" in content and (answer or content["error"]["code"] == "overloaded"):
                        break  # another peer may have the record of the answer, or room
                    if "error" in content:
                        raise JobFailed(f"{content['error']['code']}: {content['error']['message']}")
                    if "end" in content:
                        return
                    answer = content.get("answer", answer)
                    again += content.get("text", "")
                    if len(again) > len(text):  # a resumed answer comes again from its beginning
                        yield again[len(text) :]
                        text = again
            except TimeoutError:
                pass
            tries += 1
            await asyncio.sleep(0.5)
        raise JobFailed("no peer answers")

    async def _choose(self) -> dict[str, Any]:
        """Choose the peer with the fewest sessions among those that were asked least often."""
        async with asyncio.timeout(30):
            while not self._device.peers:
                await self._receive()
            while True:  # take what is there already
                try:
                    async with asyncio.timeout(0.3):
                        await self._receive()
                except TimeoutError:
                    break
        return min(self._device.peers.values(), key=lambda peer: (self.asked.count(peer["peer"]), peer["load"], os.urandom(1)))

    async def _job(self, peer: dict[str, Any], request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Send a job to a peer and yield its chunks in order. Raises: TimeoutError if the peer falls silent or leaves."""
        device, job = self._device, os.urandom(16)
        self.asked.append(peer["peer"])
        # The peer's own clock, as it was in its last presence: a device needs no clock of its own.
        now = peer["at"] + int(1000 * (time.monotonic() - peer["heard"]))
        topic = f"meshd/1/{device.cluster}/peer/{peer['peer']}/job/{device.name}/{job.hex()}"
        await self._client.publish(topic, device.seal(peer, job, 0, {"at": now, **request}), qos=1)
        waiting: dict[int, dict[str, Any]] = {}
        following = 0
        while True:
            async with asyncio.timeout(self._silence_s):
                while following not in waiting:
                    received = await self._receive()
                    if peer["peer"] not in device.peers:
                        raise TimeoutError
                    if received is None or received[0] != job.hex():
                        continue
                    try:
                        seq, content = device.open(peer, job, received[1])
                    except (InvalidTag, ValueError, struct.error):
                        continue  # somebody else's
                    if following <= seq < following + 64:  # QoS 1 may deliver a chunk twice
                        waiting[seq] = content
            yield waiting.pop(following)
            following += 1

    async def _receive(self) -> tuple[str, bytes] | None:
        """Wait for a message. Returns: job and payload of a chunk; None for a presence, which is noted."""
        message = await anext(aiter(self._client.messages))
        payload = message.payload if isinstance(message.payload, bytes) else b""
        levels = message.topic.value.split("/")
        if levels[3] == "device":
            return levels[5], payload
        if payload:
            self._device.note_presence(payload)
        return None


async def main(host: str, port: int, device: Device, model: str, question: str) -> None:
    async with aiomqtt.Client(host, port) as client:
        async for text in Asker(device, client).ask(model=model, messages=[{"role": "user", "content": question}]):
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), Device.from_json(Path(sys.argv[3]).read_text()), *sys.argv[4:6]))
