"""mDNS between real hosts, within the times that meshd promises. `pytest -s` prints the measured times."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from meshd.agents.membership.sources import PeerFound, PeerWithdrawn, Sighting, SourceNotice

pytestmark = pytest.mark.netlab

SCRIPT = Path(__file__).with_name("mdns_peer.py")
FIND_S = 3.0
"""Longest allowed time from the last start until every peer has found every other one."""
GOODBYE_S = 1.0


class Peer:
    """A process of `mdns_peer.py` on a host of a lab, and the lines that it has printed so far."""

    def __init__(self, lab: Any, host: str, letter: str, cluster: str = "c" * 16, life_s: float | None = None) -> None:
        self.id = letter * 52
        self.host = host
        self.lines: list[dict[str, Any]] = []
        self._lab = lab
        self._arguments = [cluster] if life_s is None else [cluster, str(life_s)]
        self.start()

    def start(self) -> None:
        command = [sys.executable, SCRIPT, self.id, *self._arguments]
        self.process = self._lab.popen(self.host, command, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                self.lines.append(json.loads(line))

    def first(self, kind: str | type[Sighting], other: "Peer | None" = None, since: float = 0.0) -> dict[str, Any] | None:
        """Return the first line of this kind, about `other` if given, that was printed at or after `since`. None: not yet."""
        peer = other.id if other is not None else None
        kind = kind if isinstance(kind, str) else kind.__name__
        lines = (line for line in self.lines if line["kind"] == kind and line.get("peer") == peer)
        return next((line for line in lines if line["at"] >= since), None)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)
        self._reader.join(10)


def wait_for(condition: Callable[[], bool], what: str, within_s: float = 8.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"no {what} within {within_s} s")
        time.sleep(0.005)


def sighted_s(who: Sequence[Peer], kind: type[Sighting], of: Sequence[Peer], since: float) -> float:
    """Wait until each peer in `who` has printed a sighting of each in `of`. Returns: seconds from `since` to the last sighting."""
    pairs = [(one, other) for one in who for other in of if one is not other]
    wait_for(lambda: all(one.first(kind, other, since) for one, other in pairs), f"{kind.__name__} printed by all")
    return max(float(line["at"]) - since for one, other in pairs if (line := one.first(kind, other, since)) is not None)


def last_start(peers: Sequence[Peer]) -> float:
    wait_for(lambda: all(peer.first("started") for peer in peers), "start")
    return max(float(line["at"]) for peer in peers if (line := peer.first("started")) is not None)


def find_s(peers: Sequence[Peer]) -> float:
    """Wait until all peers have found one another. Returns: seconds from the last start to the last sighting."""
    start = last_start(peers)
    sighted_s(peers, PeerFound, peers, 0.0)
    found = [
        float(line["at"])
        for one in peers
        for other in peers
        if one is not other and (line := one.first(PeerFound, other)) is not None
    ]
    return max(found) - start


@pytest.mark.parametrize("apart_s", [0.0, 0.3, 0.7, 1.5])
def test_all_peers_find_one_another_soon_after_the_last_start(make_lab: Any, apart_s: float) -> None:
    lab = make_lab(hosts=3)
    peers = []
    for host, letter in zip(lab.hosts, "abc", strict=True):
        peers.append(Peer(lab, host, letter))
        time.sleep(apart_s)
    took = find_s(peers)
    print(f"\nthree hosts, started {apart_s} s apart: all found all after {took * 1e3:.1f} ms")
    assert took < FIND_S
    found = peers[0].first(PeerFound, peers[2])
    assert found is not None
    assert found["addresses"] == [lab.ip("h3")]


@pytest.mark.parametrize("apart_s", [0.0, 0.7])
def test_peers_on_one_host_find_one_another(make_lab: Any, apart_s: float) -> None:
    lab = make_lab(hosts=1)
    peers = []
    for letter in "abc":
        peers.append(Peer(lab, "h1", letter))
        time.sleep(apart_s)
    took = find_s(peers)
    print(f"\none host, started {apart_s} s apart: all found all after {took * 1e3:.1f} ms")
    assert took < FIND_S


def test_a_peer_that_stops_is_gone_within_a_second(make_lab: Any) -> None:
    lab = make_lab(hosts=3)
    peers = [Peer(lab, host, letter) for host, letter in zip(lab.hosts, "abc", strict=True)]
    find_s(peers)
    asked = time.time()
    peers[2].stop()
    took = sighted_s(peers[:2], PeerWithdrawn, peers[2:], asked)
    print(
        f"\ngoodbye: gone from the others after {took * 1e3:.1f} ms; the process ended after {(time.time() - asked) * 1e3:.0f} ms"
    )
    assert took < GOODBYE_S


def test_a_peer_is_found_again_after_a_power_loss(make_lab: Any) -> None:
    lab = make_lab(hosts=2)
    peers = [Peer(lab, host, letter) for host, letter in zip(lab.hosts, "ab", strict=True)]
    find_s(peers)
    lab.kill("h2")
    peers[1].process.wait(10)
    lost = time.time()
    peers[1].start()
    took = sighted_s(peers[:1], PeerFound, peers[1:], lost)
    print(f"\nback after a power loss: found {took * 1e3:.0f} ms after it was started")
    assert took < FIND_S


@pytest.mark.parametrize("life_s", [0.05, 0.2])
def test_a_peer_that_restarts_at_once_is_found_again(make_lab: Any, life_s: float) -> None:
    """The new process sends the same announcements as the killed process shortly before."""
    lab = make_lab(hosts=2)
    peers = [Peer(lab, "h1", "a")]
    last_start(peers)
    peers.append(Peer(lab, "h2", "b", life_s=life_s))
    wait_for(lambda: peers[1].first("lost") is not None, "loss")
    lost = peers[1].first("lost")
    assert lost is not None
    took = sighted_s(peers[:1], PeerFound, peers[1:], lost["at"])
    print(f"\nback at once: found {took * 1e3:.0f} ms after it was lost")
    assert took < FIND_S


def test_a_peer_is_found_again_when_its_cable_is_put_back(make_lab: Any) -> None:
    lab = make_lab(hosts=2)
    peers = [Peer(lab, host, letter) for host, letter in zip(lab.hosts, "ab", strict=True)]
    find_s(peers)
    lab.cut("h2", mode="carrier")
    cut = time.time()
    wait_for(lambda: peers[1].first(SourceNotice, None, cut) is not None, "notice of the lost interface")
    lab.heal("h2")
    healed = time.time()
    took = sighted_s(peers[:1], PeerFound, peers[1:], healed)
    print(f"\ncable put back: found again after {took * 1e3:.0f} ms")
    assert took < 5.0


def test_peers_of_another_cluster_are_counted_but_not_reported(make_lab: Any) -> None:
    lab = make_lab(hosts=3)
    peers = [Peer(lab, "h1", "a"), Peer(lab, "h2", "b"), Peer(lab, "h3", "c", cluster="d" * 16)]
    find_s(peers[:2])
    last_start(peers)
    time.sleep(0.5)
    peers[0].stop()
    stopped = peers[0].first("stopped")
    assert stopped is not None
    assert stopped["others"] == {"d" * 16: 1}
    assert peers[0].first(PeerFound, peers[2]) is None
