"""`meshd doctor` names the fault and its mend when something is wrong between the daemons of two hosts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshd.protocol.identity import ClusterKey
from meshd.protocol.messages import PROTOCOL_VERSION
from real_daemons.mesh import API_KEY, Host, Mesh
from real_daemons.sites import LabSite

pytestmark = [pytest.mark.netlab, pytest.mark.timeout(300)]

ALTERED = str(Path(__file__).parents[1] / "lib" / "real_daemons" / "altered.py")
Results = list[dict[str, Any]]


class Site(LabSite):
    """A lab whose hosts can also lose single ports and multicast."""

    def in_host(self, name: str, *words: str) -> None:
        subprocess.run(["ip", "netns", "exec", self._lab.ns(name), *words], check=True, capture_output=True)

    @contextmanager
    def closed_port(self, name: str, port: int) -> Iterator[None]:
        """Drop what comes in for a TCP port inside the block, as a firewall does, and nothing that goes out."""
        # The table of local addresses comes first by itself. It has to come after the rule that drops.
        self.in_host(name, "ip", "rule", "add", "pref", "100", "lookup", "local")
        self.in_host(name, "ip", "rule", "del", "pref", "0")
        rule = ("iif", "eth0", "ipproto", "tcp", "dport", str(port), "blackhole")
        self.in_host(name, "ip", "rule", "add", "pref", "50", *rule)
        try:
            yield
        finally:
            self.in_host(name, "ip", "rule", "add", "pref", "0", "lookup", "local")
            self.in_host(name, "ip", "rule", "del", "pref", "50")
            self.in_host(name, "ip", "rule", "del", "pref", "100")

    @contextmanager
    def no_multicast(self, name: str) -> Iterator[None]:
        """Have the switch forward no multicast to a host inside the block, as an access point that isolates its clients does."""
        port = f"p{self._lab.st['hosts'][name]['i']}"
        switch = ["ip", "netns", "exec", self._lab.ns("switch"), "bridge", "link", "set", "dev", port, "mcast_flood"]
        subprocess.run([*switch, "off"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run([*switch, "on"], check=True, capture_output=True)


def doctor(mesh: Mesh, name: str, *words: str) -> tuple[int, Results]:
    """Run `meshd doctor --json` on a host. Returns: its exit status and the results."""
    command = [sys.executable, "-P", "-m", "meshd", "doctor", "--json", *words]
    command += ["--api", mesh.site.api(name), "--api-key", API_KEY, "--state", str(mesh[name].state), "--config", os.devnull]
    done = mesh.site._lab.run(name, command, timeout=120)  # type: ignore[attr-defined]
    return done.returncode, json.loads(done.stdout)["checks"]


def told(results: Results, check: str, status: str = "wrong") -> dict[str, Any]:
    """Return the result of a check with this status, or fail with all that is not ok."""
    found = [row for row in results if row["check"] == check and row["status"] == status]
    assert found, [row for row in results if row["status"] != "ok"]
    return found[0]


@pytest.fixture(scope="module")
def mesh(netlab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    site = Site(netlab, 2)
    root = tmp_path_factory.mktemp("mesh")
    mesh = Mesh(site, root, ("--models-dir", str(root / "models")))
    try:
        mesh.start()
        yield mesh
    finally:
        mesh.close()
        site.close()


@pytest.fixture
def pair(mesh: Mesh) -> Mesh:
    """Both daemons, linked, with their usual commands."""
    for host in mesh:
        if not host.running:
            host.start()
    mesh.wait_until_all_see()
    return mesh


@contextmanager
def restarted(mesh: Mesh, name: str, change: Callable[[list[str]], list[str]]) -> Iterator[Host]:
    """Run a host's daemon with another command inside the block. Afterwards it does not run: only `pair` needs the usual one."""
    host, usual = mesh[name], mesh[name].command
    if host.running:
        host.kill()
    host.command = change(list(usual))
    host.start()
    try:
        mesh.wait(host.up, f"{name} to be up", host)
        yield host
    finally:
        host.kill()
        host.command = usual


def altered(*facts: str) -> Callable[[list[str]], list[str]]:
    """Replace `-m meshd` by the script that changes the daemon's clock or versions."""
    return lambda command: [*command[:2], ALTERED, *facts, *command[4:]]


def rows(mesh: Mesh, name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a daemon's peers that have a trouble, by its kind."""
    return {row["trouble"]: row for row in mesh[name].rows_or_none("peers") if row["trouble"]}


def test_a_healthy_pair_gives_only_ok(pair: Mesh) -> None:
    status, results = doctor(pair, "h1")
    assert [row for row in results if row["status"] != "ok"] == []
    assert status == 0
    assert told(results, "peer-dials-back", "ok")["subject"] == "h2"
    assert told(results, "peer-multicast", "ok")["subject"] == "h2"


def test_multicast_that_the_switch_drops_is_named(pair: Mesh) -> None:
    site = pair.site
    assert isinstance(site, Site)
    with site.no_multicast("h2"):
        status, results = doctor(pair, "h1")
    found = told(results, "peer-multicast", "warning")
    assert "from here to it" in found["found"]
    assert "from it to here" not in found["found"]
    assert "sudo ufw allow 5353/udp" in found["mend"]
    assert status == 0


def test_a_port_that_is_closed_one_way_is_named_on_both_devices(pair: Mesh) -> None:
    site = pair.site
    assert isinstance(site, Site)
    with site.closed_port("h2", 6375):
        pair["h2"].kill()
        pair["h2"].start()
        pair.wait_until_all_see()  # by a link that h2 has dialled
        status, results = doctor(pair, "h2")
        found = told(results, "peer-dials-back")
        assert "sudo ufw allow 6375/tcp" in found["mend"]
        assert "no answer in time" in found["found"]
        assert status == 1
        there = told(doctor(pair, "h1")[1], "peer-reach", "warning")
        assert "on h2, open TCP port 6375" in there["mend"]


def test_a_peer_that_is_found_but_not_reached_has_its_reason_in_status(pair: Mesh) -> None:
    """Both ports are closed, so that no link can be made; mDNS still shows the peers."""
    site = pair.site
    assert isinstance(site, Site)
    with site.closed_port("h1", 6375), site.closed_port("h2", 6375):
        pair["h2"].kill()
        pair["h2"].start()
        pair.wait(lambda: "no answer in time" in str(rows(pair, "h1")), "the reason", pair["h1"])
        [row] = rows(pair, "h1").values()
        assert "meshd doctor" in row["hint"]
        status = [sys.executable, "-P", "-m", "meshd", "status", "--api", site.api("h1"), "--api-key", API_KEY]
        assert "can't be reached: no answer in time; a firewall drops it" in site.run("h1", status)
        found = [each for each in doctor(pair, "h1")[1] if each["check"] in ("peer-unreachable", "peer-lost")]
        assert [each["status"] for each in found] == ["wrong"]
        assert "meshd doctor" in found[0]["mend"]


def test_a_clock_that_is_off_by_a_day_is_named(mesh: Mesh) -> None:
    with restarted(mesh, "h2", altered("ahead=-86400")):
        mesh.wait(lambda: "clock" in rows(mesh, "h1"), "the clock to be noticed", mesh["h1"])
        row = rows(mesh, "h1")["clock"]
        assert row["state"] == "alive"
        assert row["reason"] == "its clock is 24 h behind this device's"
        status, results = doctor(mesh, "h1")
        found = told(results, "peer-clock")
        assert "24 h behind" in found["found"]
        assert "sudo timedatectl set-ntp true" in found["mend"]
        assert status == 1


def test_another_version_is_named(mesh: Mesh) -> None:
    protocol = f"{PROTOCOL_VERSION[0]}.{PROTOCOL_VERSION[1] + 1}"
    with restarted(mesh, "h2", altered(f"protocol={protocol}", "version=0.0.9")):
        mesh.wait(lambda: "version" in rows(mesh, "h1"), "the version to be noticed", mesh["h1"])
        status, results = doctor(mesh, "h1")
        found = told(results, "peer-version", "warning")
        assert f"it runs meshd 0.0.9 (protocol {protocol})" in found["found"]
        assert "install the same version" in found["mend"]
        assert status == 0


def test_a_peer_of_another_major_version_is_refused_with_the_reason(mesh: Mesh) -> None:
    with restarted(mesh, "h2", altered("protocol=2.0", "version=0.0.1")):
        mesh.wait(lambda: "refused" in rows(mesh, "h1"), "the refusal", mesh["h1"])
        status, results = doctor(mesh, "h1")
        found = told(results, "peer-refused")
        assert "speaks protocol 2.0" in found["found"]
        assert "install the same version" in found["mend"]
        assert status == 1


def test_another_cluster_on_the_network_and_a_named_peer_of_it_are_named(mesh: Mesh) -> None:
    code = ClusterKey.generate(os.urandom).code
    fingerprint = ClusterKey.from_code(code).fingerprint
    address = f"{mesh.site._lab.ip('h1')}:6375"  # type: ignore[attr-defined]

    def elsewhere(command: list[str]) -> list[str]:
        command[command.index("--key") + 1] = code
        command[command.index("--state") + 1] += "-elsewhere"
        return [*command, "--peer", address]

    with restarted(mesh, "h2", elsewhere):
        mesh.wait(lambda: "other cluster" in rows(mesh, "h1"), "the other cluster to be noticed", mesh["h1"])
        assert rows(mesh, "h1")["other cluster"]["name"] == fingerprint
        found = told(doctor(mesh, "h1")[1], "other-cluster", "warning")
        assert fingerprint in found["found"]
        assert "meshd key join CODE --replace" in found["mend"]
        mesh.wait(lambda: "refused" in rows(mesh, "h2"), "the refusal", mesh["h2"])
        status, results = doctor(mesh, "h2")
        found = told(results, "peer-refused")
        assert found["subject"] == address
        assert "certificate is not of this cluster" in found["found"]
        assert "meshd up --key CODE" in found["mend"]
        assert status == 1


def test_a_wrong_interface_and_links_on_loopback_only_are_named(mesh: Mesh) -> None:
    def alone(command: list[str]) -> list[str]:
        command[command.index("--link") + 1] = "127.0.0.1:6375"
        return [*command, "--interface", "wlan9"]

    with restarted(mesh, "h2", alone):
        status, results = doctor(mesh, "h2")
        found = told(results, "interfaces")
        assert "wlan9 (not here)" in found["found"]
        assert "--interface eth0" in found["mend"]
        assert "--link 0.0.0.0:6375" in told(results, "link-port", "warning")["mend"]
        assert status == 1
