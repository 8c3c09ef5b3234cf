"""Builds of different versions in one cluster: a minor version apart they work together, a major one apart they say why not."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meshd.protocol.messages import PROTOCOL_VERSION
from real_daemons.builds import next_major, next_minor
from real_daemons.cluster import MODEL, Cluster, Daemon, make_cluster, wait_for

pytestmark = pytest.mark.timeout(420)  # three daemons are started twice, beside requests that never pause
FLAGS = ("--drain-timeout", "60", "--copies", "2")
TOKENS = 12


def ask(daemon: Daemon, **mesh: object) -> str:
    """Ask for an answer, again while the model is being loaded, as after a restart. Returns: its text. Raises: AssertionError."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, "mesh": mesh}
    body |= {"max_tokens": TOKENS, "ignore_eos": True}
    until = time.monotonic() + 60
    status, answer, _ = daemon.post_raw("/v1/chat/completions", body)
    while status == 503 and answer["error"]["code"] == "model_loading" and time.monotonic() < until:
        time.sleep(0.5)
        status, answer, _ = daemon.post_raw("/v1/chat/completions", body)
    assert status == 200, answer
    text: str = answer["choices"][0]["message"]["content"]
    return text


@dataclass
class Stream:
    """Clients that send one request after the other, each to a daemon in service, as a load balancer would."""

    cluster: Cluster
    in_service: list[str]
    texts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopping.is_set():
            name = chance.choice(self.in_service)
            try:
                self.texts.append(ask(self.cluster[name]))
            except Exception as error:
                self.failures.append(f"{name}: {error!r}")

    def passed(self, more: int) -> None:
        """Wait until so many more requests are answered, and that none has failed."""
        wanted = len(self.texts) + more
        wait_for(lambda: self.failures or len(self.texts) >= wanted, f"{more} more answers", self.cluster[self.in_service[0]], 120)
        assert self.failures == []


@pytest.fixture
def cluster(tmp_path: Path, shared_cache: Path) -> Iterator[Cluster]:
    (tmp_path / "daemons").mkdir()
    yield from make_cluster(tmp_path / "daemons", shared_cache)


def upgrade(cluster: Cluster, name: str, build: Path) -> None:
    """Replace one daemon by one of the new build, with the same state folder and addresses, as docs/operations.md says."""
    old = cluster[name]
    other = next(daemon for daemon in cluster.daemons.values() if daemon.name != name)
    drain = [sys.executable, "-P", "-m", "meshd", "drain", name, "--api", other.api]
    done = subprocess.run(drain, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    old.process.terminate()
    assert old.process.wait(90) == 0
    cluster.build = build
    first = next(iter(cluster.daemons))
    del cluster.daemons[name]
    flags = (*FLAGS, "--api", old.api.removeprefix("http://"), "--link", old.link)
    cluster.start(name, flags=flags)
    if name == first:  # the one that the others name with --peer
        cluster.daemons = {name: cluster.daemons.pop(name), **cluster.daemons}


def test_three_peers_are_upgraded_one_at_a_time_and_no_request_fails(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start("a", "b", "c", flags=FLAGS)
    cluster.see_each_other()
    build = next_minor(tmp_path / "build")
    expected = ask(cluster["a"])
    stream = Stream(cluster, ["a", "b", "c"])
    clients = [threading.Thread(target=stream.run, args=(seed,)) for seed in range(2)]
    for client in clients:
        client.start()
    try:
        stream.passed(3)
        for name in ("a", "b", "c"):
            stream.in_service = [other for other in ("a", "b", "c") if other != name]
            upgrade(cluster, name, build)
            cluster.see_each_other()
            stream.in_service = ["a", "b", "c"]
            stream.passed(3)
            if name == "a":  # new coordinator and first stage with an old last stage, then the other way round
                assert ask(cluster["a"], stages="a:0-15,b:15-30") == expected
                assert ask(cluster["b"], stages="b:0-15,a:15-30") == expected
                assert ask(cluster["b"], stages="a:0-15,c:15-30") == expected
    finally:
        stream.stopping.set()
        for client in clients:
            client.join(60)
    assert stream.failures == []
    assert set(stream.texts) == {expected}
    minor = PROTOCOL_VERSION[1] + 1
    for daemon in cluster.daemons.values():
        assert daemon.get("/mesh/v1/self")["protocol"] == f"{PROTOCOL_VERSION[0]}.{minor}"
        assert 'event="greeted: good morning"' in daemon.log.read_text(), f"{daemon.name} took the new message of another new build"
        assert cluster.alive(daemon) == {"a", "b", "c"}


def refused(daemon: Daemon) -> list[dict[str, Any]]:
    return [row for row in daemon.rows("peers") if row["state"] == "refused"]


def test_a_minor_version_apart_keeps_the_link_and_a_major_one_says_why_there_is_none(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start("a", flags=FLAGS)
    cluster.build = next_minor(tmp_path / "minor")
    cluster.start("b", flags=FLAGS)
    cluster.see_each_other()
    cluster.build = next_major(tmp_path / "major")
    cluster.start("c", flags=FLAGS)  # dials a
    for name, other in (("a", "c"), ("c", "a")):
        wait_for(lambda name=name: refused(cluster[name]), f"{name} to refuse {other}", cluster[name])
        ours, theirs = (PROTOCOL_VERSION, (PROTOCOL_VERSION[0] + 1, 0))[:: 1 if name == "a" else -1]
        why = refused(cluster[name])[0]["reason"]
        assert f"protocol {theirs[0]}.{theirs[1]}" in why, why
        assert f"this peer {ours[0]}.{ours[1]}" in why, why
    command = [sys.executable, "-P", "-m", "meshd", "status", "--api", cluster["a"].api]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    assert f"speaks protocol {PROTOCOL_VERSION[0] + 1}.0" in shown
    wait_for(lambda: "reports: " in cluster["b"].log.read_text(), "a's ERROR to arrive at b", cluster["b"])
    assert "4000" in cluster["b"].log.read_text(), "the number of the message that a does not know"
    time.sleep(3)  # longer than the silence after which a link ends
    assert cluster.alive(cluster["a"]) == cluster.alive(cluster["b"]) == {"a", "b"}
    assert "is down" not in cluster["a"].log.read_text() + cluster["b"].log.read_text()
    assert ask(cluster["a"])
