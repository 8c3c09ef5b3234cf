"""Peers on two subnets, between which no multicast passes, with mosquitto on the router. `pytest -s` prints the figures."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mqtt.mosquitto import MISSING, PROGRAM, Mosquitto
from real_daemons.mesh import Host, Mesh, pull_model, running
from real_daemons.sites import LabSite
from real_daemons.streams import Streaming, of_length

pytestmark = [
    pytest.mark.netlab,
    pytest.mark.timeout(400),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]

PORT = 1883
FIND_S = 3.0
FORGED = 10_000
FORGE_S = 120.0
MEMORY_BYTES = 24 << 20
"""Growth that a daemon's memory may show during the flood. Its allocator's arenas are 64 MiB; one forgery has 1 KiB."""
LIB = Path(__file__).parents[1] / "lib"
STAGES = {"stages": "h1:0-15,h3:15-30"}


def when(host: Host, text: str) -> float | None:
    """Returns: when the daemon first logged an event that begins with `text`; None if it did not yet."""
    for line in host.log.read_text().splitlines():
        if line.startswith("{") and (entry := json.loads(line))["event"].startswith(text):
            return datetime.fromisoformat(entry["time"]).timestamp()
    return None


@pytest.fixture(scope="module")
def site(netlab: Any) -> Iterator[LabSite]:
    with LabSite(netlab, 4, subnets=2) as site:
        yield site


@pytest.fixture(scope="module")
def broker(site: LabSite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    folder = tmp_path_factory.mktemp("broker")
    with Mosquitto(folder, host="0.0.0.0", port=PORT, popen=partial(site.lab.popen, "router")) as broker:
        yield broker


@pytest.fixture(scope="module")
def mesh(site: LabSite, broker: Mosquitto, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    pull_model()
    flags = ("--mqtt", f"mqtt://{site.lab.ip('router', 0)}", "--log-format", "json", "--copies", "1", "--mqtt-telemetry", "1")
    with running(site, tmp_path_factory.mktemp("mesh"), flags) as mesh:
        yield mesh


def test_all_peers_of_both_subnets_are_one_cluster_soon_after_the_last_is_at_the_broker(mesh: Mesh) -> None:
    mesh.wait_until_all_see()
    at_broker = max(at for host in mesh if (at := when(host, "at the MQTT broker")) is not None)
    names = [host.name for host in mesh]
    alive = [at for host in mesh for name in names if (at := when(host, f"peer {name} (")) is not None]
    assert len(alive) == len(mesh.hosts) * (len(mesh.hosts) - 1)
    sources = {source for row in mesh["h1"].rows("peers") for source in row["sources"]}
    print(f"\nall of {len(mesh.hosts)} linked with all {1000 * (max(alive) - at_broker):.0f} ms after the last was at the broker")
    assert max(alive) - at_broker < FIND_S
    assert "mqtt" in sources


def test_a_split_answer_goes_on_while_the_broker_restarts(mesh: Mesh, broker: Mosquitto) -> None:
    mesh.wait_until_all_see()
    spec = of_length(256, 96)
    undisturbed = Streaming(mesh.site, "h1", spec, STAGES).end()
    begun = Streaming(mesh.site, "h1", spec, STAGES, silence_s=30)
    begun.wait_for(16)
    broker.stop()
    begun.wait_for(48)
    broker.start()
    answer = begun.end()
    assert answer.differences_from(undisturbed) == []
    assert answer.plan == STAGES["stages"]
    assert not any("recover" in line["what"] for line in mesh.story(answer.session))
    for host in mesh:
        mesh.wait(lambda host=host: host.get("/mesh/v1/self")["mqtt"]["connected"], "the broker again", host)
        assert {row["state"] for row in host.rows("peers")} == {"alive"}


def test_forged_and_replayed_presences_are_not_believed_and_cost_little(mesh: Mesh, site: LabSite) -> None:
    mesh.wait_until_all_see()
    before = {host.name: (host.resident_bytes(), _known(host)) for host in mesh}
    command = [sys.executable, "-P", "-m", "mqtt.forgeries", "127.0.0.1", str(PORT), str(FORGED), site.lab.ip("router", 0)]
    path = os.pathsep.join([str(LIB), os.environ.get("PYTHONPATH", str(LIB.parents[1]))])
    began = time.monotonic()
    done = site.lab.run("router", command, timeout=FORGE_S, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    print(f"\n{outcome} in {time.monotonic() - began:.0f} s")
    assert outcome == {"published": FORGED, "connections": 0}
    for host in mesh:
        memory, known = before[host.name]
        mesh.wait(lambda host=host: _not_believed(host) > FORGED / 2, "the forgeries to be read", host)
        about = host.get("/mesh/v1/self")["mqtt"]
        grown = host.resident_bytes() - memory
        print(f"{host.name}: grown by {grown / 2**20:.1f} MiB, {about}")
        assert _known(host) == known
        assert about["peers"] == len(mesh.hosts)
        assert grown < MEMORY_BYTES
    assert Streaming(mesh.site, "h1", of_length(64, 8), STAGES).end().ended


@pytest.mark.parametrize("hidden", [("h1",), ("h2",), ("h1", "h2")], ids=",".join)
def test_the_side_that_can_dials_the_other_and_else_both_say_so(netlab: Any, tmp_path: Path, hidden: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        site = stack.enter_context(LabSite(netlab, 2, subnets=2))
        stack.enter_context(Mosquitto(tmp_path, host="0.0.0.0", port=PORT, popen=partial(site.lab.popen, "router")))
        mesh = Mesh(site, tmp_path, ("--mqtt", f"mqtt://{site.lab.ip('router', 0)}", "--discovery", "mqtt"))
        stack.callback(mesh.close)
        for name in hidden:  # accepts no links from outside, like a device behind NAT
            mesh[name].command = [word.replace("0.0.0.0:6375", "127.0.0.1:6375") for word in mesh[name].command]
        if len(hidden) == 1:
            mesh.start()
            return
        for host in mesh:
            host.start()
        for host in mesh:
            mesh.wait(partial(_says_apart, host), "the notice that neither can dial the other", host)


def _not_believed(host: Host) -> int:
    about = host.get("/mesh/v1/self")["mqtt"]
    return int(sum(about["refused"].values()) + about["too_long"])


def _says_apart(host: Host) -> bool:
    notices = host.get("/mesh/v1/self")["notices"] if host.up() else []
    return any("neither it nor this peer can dial the other" in notice["message"] for notice in notices)


def _known(host: Host) -> dict[str, tuple[str, frozenset[str]]]:
    return {row["id"]: (row["state"], frozenset(row["addresses"])) for row in host.rows("peers")}
