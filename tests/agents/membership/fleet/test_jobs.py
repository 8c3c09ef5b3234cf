"""Which jobs a peer takes, how many at a time, and what it sends. The coordinator invents its answers."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from fake_api.words import WordsCoordinator
from meshd.agents.membership.fleet.broker import Broker
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.fleet.jobs import MAX_PER_DEVICE, MAX_RUNNING, MAX_SEEN_PER_DEVICE, JobServer
from meshd.agents.membership.fleet.sealing import Direction, JobSeal, key_check, read_sealed
from meshd.agents.membership.fleet.topics import REQUEST_BYTES, JobTopic, Topics
from meshd.agents.service import Coordinator
from meshd.clock import SystemClock
from meshd.errors import PeerLost
from meshd.protocol.identity import Identity
from meshd.types import MqttDevice

SINCE = 7
ASK = {"model": "words", "prompt": "one two three", "max_tokens": 12, "seed": 5}


class Outbox:
    """Takes what is published."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.broken = False

    async def publish_in(self, seconds: float, topic: str, payload: bytes) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise PeerLost("the broker is away")
        self.messages.append((topic, payload))


class Keys:
    """The valid devices, by serial."""

    def __init__(self) -> None:
        self.devices: dict[str, MqttDevice] = {}

    def valid(self, serial: str) -> MqttDevice | None:
        return self.devices.get(serial)


class Site:
    """A job server with devices."""

    def __init__(self, identity: Identity) -> None:
        self.identity, self.outbox, self.keys, self.coordinator = identity, Outbox(), Keys(), WordsCoordinator()
        self.topics = Topics(identity.fingerprint)
        self.server = JobServer(
            lambda: self.identity,
            self.topics,
            cast("Broker", self.outbox),
            cast("DeviceList", self.keys),
            cast("Coordinator", self.coordinator),
            SystemClock(),
        )

    def device(self, name: str = "door") -> MqttDevice:
        serial = os.urandom(16)
        check = key_check(self.identity.key.device_key(name, serial))
        device = MqttDevice(serial=serial.hex(), name=name, check=check, added=1.0)
        self.keys.devices[device.serial] = device
        return device

    def seal(self, device: MqttDevice, job: str, *, since: int = SINCE) -> JobSeal:
        key = self.identity.key.device_key(device.name, bytes.fromhex(device.serial))
        peer = self.identity.peer
        return JobSeal(key=key, cluster=self.identity.fingerprint, peer=peer, device=device.name, job=job, since=since)

    def request(self, device: MqttDevice, job: str, seq: int = 0, *, ago_s: float = 0.0, **content: Any) -> bytes:
        at = int(1000 * (SystemClock().wall() - ago_s))
        plain = json.dumps({"at": at, **content}).encode()
        return self.seal(device, job).seal(Direction.REQUEST, seq, bytes.fromhex(device.serial), plain)

    def send(self, device: MqttDevice, job: str, payload: bytes, name: str = "") -> None:
        self.server.on_message(JobTopic(name or device.name, job), payload, SINCE)

    def ask(self, device: MqttDevice, **content: Any) -> str:
        job = os.urandom(16).hex()
        self.send(device, job, self.request(device, job, **(ASK | content)))
        return job

    def chunks(self, device: MqttDevice, job: str) -> list[dict[str, Any]]:
        """Open what was published for a job, in order."""
        opened = []
        for topic, payload in self.outbox.messages:
            if topic == self.topics.answer(device.name, job):
                sealed = read_sealed(payload)
                assert sealed.seq == len(opened)
                opened.append(json.loads(self.seal(device, job).open(Direction.ANSWER, sealed)))
        return opened

    async def finished(self) -> None:
        async with asyncio.timeout(10):
            while len(self.server):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
async def site(identity: Identity) -> AsyncIterator[Site]:
    site = Site(identity)
    running = asyncio.create_task(site.server.run())
    await asyncio.sleep(0)
    yield site
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await site.coordinator.aclose()


async def test_the_answer_comes_in_order_with_its_secret_and_its_end(site: Site) -> None:
    device = site.device()
    job = site.ask(device)
    await site.finished()
    first, *texts, last = site.chunks(device, job)
    assert len(first["answer"]) == 32
    assert "".join(chunk["text"] for chunk in texts).strip()
    assert (last["end"], last["completion_tokens"]) == ("length", 12)
    (request,) = site.coordinator.requests
    assert (request.prompt, request.max_tokens, request.sampling.seed) == ("one two three", 12, 5)


async def test_an_answer_can_be_resumed_with_its_secret(site: Site) -> None:
    device = site.device()
    first = site.ask(device)
    await site.finished()
    again = site.ask(device, model="", prompt="", resume=site.chunks(device, first)[0]["answer"])
    await site.finished()
    texts = ["".join(chunk.get("text", "") for chunk in site.chunks(device, job)) for job in (first, again)]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"model": "unknown"}, "model_not_found"),
        ({"model": "busy"}, "overloaded"),
        ({"prompt": ""}, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x"}]}, "invalid_value"),
        ({"tools": []}, "invalid_value"),
        ({"max_tokens": 1_000_000}, "invalid_value"),
        ({"temperature": float("nan")}, "invalid_value"),
        ({"resume": "0" * 32}, "session_not_found"),
        ({"model": "breaks"}, "peer_lost"),
    ],
    ids=str,
)
async def test_the_device_learns_why_there_is_no_answer(site: Site, content: dict[str, Any], code: str) -> None:
    device = site.device()
    job = site.ask(device, **content)
    await site.finished()
    assert site.chunks(device, job)[-1]["error"]["code"] == code


async def test_a_repeated_request_is_not_run_again(site: Site) -> None:
    device, job = site.device(), os.urandom(16).hex()
    payload = site.request(device, job, **ASK)
    for _ in range(3):
        site.send(device, job, payload)
    await site.finished()
    site.send(device, job, payload)
    await site.finished()
    assert len(site.coordinator.requests) == 1
    assert site.server.refused["repeated"] == 3


async def test_what_is_not_of_a_valid_device_gets_no_answer(site: Site) -> None:
    device, job = site.device(), os.urandom(16).hex()
    payload = site.request(device, job, **ASK)
    old = site.request(device, job[::-1], ago_s=301, **ASK)
    other = site.device("window")
    site.send(device, job, payload[:-1])
    site.send(device, job, b"\x01" + payload[1:5] + bytes(16) + payload[21:])
    site.send(device, job, payload, name="window")
    site.send(other, job, payload[:5] + bytes.fromhex(other.serial) + payload[21:])
    site.send(device, "00" * 16, payload)
    site.send(device, job, b"junk")
    site.send(device, job, bytes(REQUEST_BYTES + 1))
    site.send(device, job[::-1], old)
    site.server.on_message(JobTopic(device.name, job), payload, SINCE + 1)  # of an earlier connection of this peer
    stale = MqttDevice(serial=device.serial, name=device.name, check="0" * 8, added=1.0)
    site.keys.devices[device.serial] = stale  # its key is of an earlier cluster key
    site.send(device, job, payload)
    del site.keys.devices[device.serial]
    site.send(device, job, payload)
    await site.finished()
    assert not site.outbox.messages
    assert not site.coordinator.requests
    assert site.server.refused == {"forged": 4, "unknown device": 4, "malformed": 1, "too long": 1, "old": 1}


async def test_the_number_of_running_jobs_is_bounded_for_each_device_and_in_all(site: Site) -> None:
    devices = [site.device(f"d{number}") for number in range(MAX_RUNNING)]
    jobs = [(device, site.ask(device, model="queued")) for device in devices[:1] for _ in range(MAX_PER_DEVICE + 1)]
    await site.coordinator.until(lambda here: here.waiting == MAX_PER_DEVICE)
    for device in devices[1:]:
        jobs += [(device, site.ask(device, model="queued")) for _ in range(MAX_PER_DEVICE)]
    await site.coordinator.until(lambda here: here.waiting == MAX_RUNNING)
    site.coordinator.turn.set()
    await site.finished()
    outcomes = [site.chunks(device, job)[-1] for device, job in jobs]
    assert sum("end" in outcome for outcome in outcomes) == MAX_RUNNING
    assert {outcome["error"]["code"] for outcome in outcomes if "error" in outcome} == {"overloaded"}


async def test_the_number_of_remembered_requests_is_bounded_for_each_device(site: Site) -> None:
    device = site.device()
    for _ in range(MAX_SEEN_PER_DEVICE + 20):
        site.ask(device, model="unknown")
        await asyncio.sleep(0.002)
    await site.finished()
    assert site.server.refused["too many"] >= 20
    other = site.device("other")
    job = site.ask(other)
    await site.finished()
    assert site.chunks(other, job)[-1]["end"] == "length"


async def test_a_device_can_cancel_its_job(site: Site) -> None:
    device = site.device()
    job = site.ask(device, model="endless", max_tokens=4000)
    async with asyncio.timeout(10):
        while len(site.chunks(device, job)) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    site.send(device, job, site.request(device, job, seq=1))
    await site.finished()
    await site.coordinator.until(lambda here: here.running == 0)
    assert "end" not in site.chunks(device, job)[-1]


async def test_a_job_whose_chunks_nobody_takes_ends(site: Site) -> None:
    site.outbox.broken = True
    site.ask(site.device(), model="endless", max_tokens=4000)
    await site.finished()
    await site.coordinator.until(lambda here: here.running == 0)


async def started(site: Site, device: MqttDevice) -> str:
    """Have the device ask for an endless answer, and wait until some of it has come."""
    job = site.ask(device, model="endless", max_tokens=4000)
    async with asyncio.timeout(10):
        while len(site.chunks(device, job)) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return job


async def test_a_running_job_ends_when_its_key_is_revoked(site: Site) -> None:
    device, other = site.device(), site.device("window")
    job, its = await started(site, device), await started(site, other)
    del site.keys.devices[device.serial]
    await site.coordinator.until(lambda here: here.running == 1)
    async with asyncio.timeout(10):
        while len(site.server) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "end" not in site.chunks(device, job)[-1]
    assert "end" not in site.chunks(other, its)[-1]


async def test_a_new_cluster_key_ends_the_keys_of_devices_and_their_jobs(site: Site, rotated: Identity) -> None:
    """An excluded member could derive the key of every device from the old cluster key."""
    device = site.device()
    begun = await started(site, device)
    late = site.request(device, "ab" * 16, **ASK)
    old, site.identity = site.identity, rotated
    site.send(device, "ab" * 16, late)
    assert site.server.refused == {"unknown device": 1}
    await site.coordinator.until(lambda here: here.running == 0)
    await site.finished()
    fresh = site.device("new")
    job = site.ask(fresh)
    await site.finished()
    assert site.chunks(fresh, job)[-1]["end"] == "length"
    site.identity = old
    assert "end" not in site.chunks(device, begun)[-1]
