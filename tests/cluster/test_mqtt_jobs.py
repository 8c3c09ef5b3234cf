"""A device that speaks only MQTT asks a cluster of real daemons, through mosquitto."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from meshd.agents.membership.fleet.devices import load_devices
from meshd.state import StateFolder
from meshd.types import MqttDevice
from mqtt.device import mqtt_device
from mqtt.mosquitto import MISSING, PROGRAM, Mosquitto
from real_daemons.cluster import MODEL, Cluster, Daemon, make_cluster, wait_for

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(PROGRAM is None, reason=MISSING)]
REQUEST = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse."}], "temperature": 0}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, broker: Mosquitto) -> Iterator[Cluster]:
    for cluster in make_cluster(tmp_path_factory.mktemp("jobs"), shared_cache):
        cluster.start("a", "b", "c", flags=("--mqtt", broker.url), discovery="static,mqtt")
        cluster.see_each_other()
        cluster.place("a", stages="a:0-15,b:15-30", context=1024)
        yield cluster


def key_mqtt(daemon: Daemon, *words: str) -> Any:
    command = [sys.executable, "-P", "-m", "meshd", "key", "mqtt", *words, "--json", "--state", str(daemon.state)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)


def device_of(cluster: Cluster, at: str, name: str) -> Any:
    """Make a device's key at one daemon, and wait until all know it."""
    given = key_mqtt(cluster[at], "add", name)
    for daemon in cluster.daemons.values():
        if daemon.process.poll() is None:
            wait_for(lambda daemon=daemon: _device_at(daemon, given["serial"]), "the device's key", daemon)
    return mqtt_device.Device.from_json(json.dumps(given))


def _device_at(daemon: Daemon, serial: str) -> MqttDevice | None:
    """Returns: what a daemon has stored of a device. To ask the command line takes a second each time."""
    return load_devices(StateFolder(daemon.state)).get(serial)


def _revoked_at(daemon: Daemon, serial: str) -> bool:
    device = _device_at(daemon, serial)
    return device is not None and device.revoked > 0


def whole_answer(daemon: Daemon, max_tokens: int) -> str:
    answer = daemon.post("/v1/chat/completions", {**REQUEST, "max_tokens": max_tokens})
    text: str = answer["choices"][0]["message"]["content"]
    return text


async def ask(broker: Mosquitto, device: Any, after: Any = None, silence_s: float = 10.0, **request: Any) -> tuple[str, list[str]]:
    """Ask. `after(peers asked)` is called when the first text has come. Returns: the answer, and the ids of the peers asked."""
    async with aiomqtt.Client(broker.host, broker.port) as client:
        asker = mqtt_device.Asker(device, client, silence_s)
        text = ""
        async for piece in asker.ask(**request):
            if not text and after is not None:
                await asyncio.to_thread(after, asker.asked)
            text += piece
    return text, asker.asked


async def test_a_device_gets_the_answer_that_a_client_of_http_gets(mesh: Cluster, broker: Mosquitto) -> None:
    device = device_of(mesh, "a", "door")
    expected = await asyncio.to_thread(whole_answer, mesh["a"], 40)
    text, asked = await ask(broker, device, max_tokens=40, **REQUEST)
    assert text == expected
    assert len(asked) == 1


async def test_a_wrong_request_is_answered_with_its_reason(mesh: Cluster, broker: Mosquitto) -> None:
    device = device_of(mesh, "a", "window")
    with pytest.raises(mqtt_device.JobFailed, match="model_not_found"):
        await ask(broker, device, model="nobody/knows-it", prompt="x")
    with pytest.raises(mqtt_device.JobFailed, match="invalid_value"):
        await ask(broker, device, model=MODEL)


async def test_nothing_readable_goes_over_the_broker(mesh: Cluster, broker: Mosquitto) -> None:
    device = device_of(mesh, "b", "gate")
    seen: list[bytes] = []

    async def listen() -> None:
        async with aiomqtt.Client(broker.host, broker.port) as client:
            await client.subscribe("#")
            async for message in client.messages:
                assert isinstance(message.payload, bytes)
                seen.append(message.topic.value.encode() + b" " + message.payload)

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.5)
    text, _ = await ask(broker, device, max_tokens=20, **REQUEST)
    await asyncio.sleep(0.5)
    listening.cancel()
    assert any(b"/device/gate/" in each for each in seen)
    words = [word.encode() for word in (text + " lighthouse").split() if len(word) > 6]
    assert words
    assert not [word for word in words for each in seen if word in each]
    code = mesh.key(mesh["a"])
    assert not any(device.key in each or device.key.hex().encode() in each or code.encode() in each for each in seen)


async def test_a_revoked_key_is_refused_by_all_peers(mesh: Cluster, broker: Mosquitto) -> None:
    device = device_of(mesh, "a", "lost")
    key_mqtt(mesh["b"], "rm", "lost")
    for daemon in mesh.daemons.values():
        wait_for(lambda daemon=daemon: _revoked_at(daemon, device.serial.hex()), "the revocation", daemon)
    (row,) = [row for row in key_mqtt(mesh["c"], "list")["data"] if row["name"] == "lost"]
    assert row["state"] == "revoked"
    with pytest.raises(mqtt_device.JobFailed, match="no peer answers"):
        await ask(broker, device, silence_s=0.3, max_tokens=5, **REQUEST)
    assert all(daemon.get("/mesh/v1/self")["mqtt"]["jobs_refused"]["unknown device"] > 0 for daemon in mesh.daemons.values())


async def test_an_answer_goes_on_at_another_peer_when_its_peer_dies(mesh: Cluster, broker: Mosquitto) -> None:
    device = device_of(mesh, "a", "lamp")
    expected = await asyncio.to_thread(whole_answer, mesh["a"], 96)
    rows = mesh["a"].rows("peers")
    names = {row["id"]: row["name"] for row in rows}
    killed: list[str] = []

    def kill(asked: list[str]) -> None:
        killed.append(names[asked[0]])
        mesh[killed[0]].kill()

    text, asked = await ask(broker, device, kill, silence_s=3.0, max_tokens=96, **REQUEST)
    assert text == expected
    assert len(set(asked)) > 1
    assert killed
