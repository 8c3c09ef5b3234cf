"""Daemons as child processes. They stop when this process ends, even if it is killed."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from meshd.cli.support.client import Daemon, url_of
from meshd.config import clean_environment
from meshd.errors import NotReady, RemoteFailure
from meshd.settings import API_PORT
from meshd.state import read_holder
from meshd.values import parse_address

POLL_S = 0.05
STOP_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class ChildDaemon:
    """A daemon that runs as a child process."""

    name: str
    state: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        return self.state.with_suffix(".log")

    def daemon(self) -> Daemon | None:
        """Return a client of the daemon's API; None until the API listens. Raises: RemoteFailure if the daemon has ended."""
        if self.process.poll() is not None:
            raise RemoteFailure(f"{self.name} did not stay up (exit status {self.process.returncode}): {self._last_words()}")
        holder = read_holder(self.state)
        address = parse_address(holder.api, API_PORT) if holder and holder.api else None
        return Daemon(url_of(address)) if address and address.port else None

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")


class ChildDaemons:
    """Starts daemons. Leaving the block stops those that still run."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for the daemons' state folders and logs."""
        self.children: list[ChildDaemon] = []
        self._folder = folder

    def start(self, name: str, join_code: str, flags: Sequence[str]) -> ChildDaemon:
        """Run `meshd up` with these flags, in the cluster of a join code, which is passed where other users can't read it.

        The daemon's standard input is a pipe that closes when this process ends, which stops the daemon.
        """
        state = self._folder / name
        state.mkdir(mode=0o700)
        command = [
            sys.executable,
            "-P",
            "-m",
            "meshd",
            "up",
            "--stop-with-stdin",
            "--config",
            os.devnull,
            "--name",
            name,
            "--state",
            str(state),
            *flags,
        ]
        with state.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=clean_environment() | {"MESHD_KEY": join_code},
                start_new_session=True,
            )
        child = ChildDaemon(name, state, process)
        self.children.append(child)
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Terminate all daemons, and kill those that still run after STOP_WITHIN_S."""
        for child in self.children:
            child.process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for child in self.children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            if child.process.stdin:
                child.process.stdin.close()


def free_ports(count: int) -> list[int]:
    """Find TCP ports of the loopback address that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


def wait_until(done: Callable[[], bool], within_s: float, what: str) -> None:
    """Poll `done` every POLL_S. Raises: NotReady after `within_s`."""
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise NotReady(f"{what} did not finish within {within_s:.0f} s")
        time.sleep(POLL_S)
