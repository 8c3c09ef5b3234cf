"""A mosquitto of a test: its own configuration, port and folder; never the system's service."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

PROGRAM = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")
MISSING = "mosquitto is not installed"
Popen = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Mosquitto:
    """A broker that can be stopped and started again. Retained messages are lost, as on a broker without persistence."""

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        lines: Sequence[str] = ("allow_anonymous true",),
        popen: Popen = subprocess.Popen,
    ) -> None:
        assert PROGRAM is not None, MISSING
        self.host, self.port = host, port or free_port()
        self._log = folder / "mosquitto.log"
        self._file = folder / "mosquitto.conf"
        self._file.write_text("\n".join(["user root", f"listener {self.port} {host}", "log_type all", *lines, ""]))
        self._popen = popen
        self._process: Any = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> "Mosquitto":
        """Start the broker and wait until it listens."""
        before = self.log().count(" running") if self._log.exists() else 0
        with self._log.open("a") as output:
            self._process = self._popen([PROGRAM, "-c", str(self._file)], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while self.log().count(" running") <= before:
            assert self._process.poll() is None, self.log()[-2000:]
            assert time.monotonic() < until, "mosquitto does not start"
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)

    def kill(self) -> None:
        """End it at once. A broker that is stopped publishes the last wills of its clients first."""
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
