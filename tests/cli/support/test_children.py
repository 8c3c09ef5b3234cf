import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.cli.support.children import ChildDaemon, ChildDaemons, free_ports, wait_until
from meshd.errors import NotReady, RemoteFailure


def test_a_daemon_that_can_not_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with ChildDaemons(tmp_path) as children:
        child = children.start("ash", "mesh-CODE", ["--no-such-flag"])
        child.process.wait(60)
        with pytest.raises(RemoteFailure, match=r"ash did not stay up \(exit status 2\): meshd: wrong usage of `meshd up`"):
            child.daemon()
        assert child.log == tmp_path / "ash.log"


def test_leaving_the_block_stops_every_child(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    child = ChildDaemon("ash", tmp_path / "ash", process)
    with ChildDaemons(tmp_path) as children:
        children.children.append(child)
        assert child.daemon() is None
    assert process.poll() is not None


def test_free_ports_differ_and_can_be_listened_on() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_wait_ends_with_its_condition_or_with_an_error() -> None:
    answers = iter([False, True])
    wait_until(lambda: next(answers), 5.0, "it")
    with pytest.raises(NotReady, match="the start did not finish within 0 s"):
        wait_until(lambda: False, 0.0, "the start")
