"""Messages to the service manager, over real datagram sockets."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cli.support.service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A socket as the service manager's, and its address in NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        name = str(tmp_path / "notify") if request.param == "path" else f"@meshd-test-{os.getpid()}"
        heard.bind("\0" + name[1:] if name.startswith("@") else name)
        heard.settimeout(5)
        yield name, heard


def lines(heard: socket.socket) -> list[str]:
    return heard.recv(4096).decode().splitlines()


def test_readiness_and_stopping_are_said_with_a_status_of_one_line(listener: tuple[str, socket.socket]) -> None:
    address, heard = listener
    manager = ServiceManager.of({"NOTIFY_SOCKET": address})
    manager.status("measuring")
    manager.ready("up\nREADY=0" + "x" * 500)
    manager.reloading()
    manager.stopping("leaving")
    assert lines(heard) == ["STATUS=measuring"]
    ready, status = lines(heard)
    assert ready == "READY=1"
    assert status.startswith("STATUS=up READY=0x")
    assert len(status) <= 210
    reloading, at = lines(heard)
    assert reloading == "RELOADING=1"
    assert abs(int(at.removeprefix("MONOTONIC_USEC=")) / 1e6 - time.monotonic()) < 60
    assert lines(heard) == ["STOPPING=1", "STATUS=leaving"]


async def test_a_loop_that_is_stuck_says_nothing(listener: tuple[str, socket.socket]) -> None:
    address, heard = listener
    manager = ServiceManager.of({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000", "WATCHDOG_PID": str(os.getpid())})
    watching = asyncio.ensure_future(manager.watch())
    await asyncio.sleep(0.35)
    beats = 0
    heard.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while lines(heard) == ["WATCHDOG=1"]:
            beats += 1
    assert beats >= 3
    time.sleep(0.5)  # noqa: ASYNC251  # the stuck loop
    with pytest.raises(BlockingIOError):
        heard.recv(4096)
    await asyncio.sleep(0.15)
    assert lines(heard) == ["WATCHDOG=1"]
    watching.cancel()


@pytest.mark.parametrize("variables", [{}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": "/no/such/socket"}])
async def test_without_a_listening_manager_nothing_happens(variables: dict[str, str]) -> None:
    manager = ServiceManager.of(variables)
    manager.ready("up")
    await asyncio.wait_for(manager.watch(), 5)


def test_another_process_is_not_watched() -> None:
    variables = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "60000000"}
    assert ServiceManager.of(variables | {"WATCHDOG_PID": "1"}).watchdog_s == 0
    assert ServiceManager.of(variables).watchdog_s == 60


def test_a_manager_that_does_not_read_does_not_hold_the_daemon(listener: tuple[str, socket.socket]) -> None:
    address, _ = listener
    manager = ServiceManager.of({"NOTIFY_SOCKET": address})
    for _ in range(2000):  # far more than the queue of the socket
        manager.status("x" * 200)
