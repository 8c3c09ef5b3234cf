"""Talks to the service manager that started this process: systemd, or one with the same protocol (sd_notify(3)).

It hears that the daemon is ready, what it does, that it stops, and, as a watchdog, that the event loop still runs. Each message is
one datagram. A manager that does not listen is no error: the daemon does not depend on it.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from meshd.bounds import printable

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_MAX_STATUS = 200
_WAIT_S = 1.0
"""A lost READY would have the daemon killed. The queue of a datagram socket has room for ten messages only."""
_BEATS_PER_LIMIT = 3
"""Messages in the time after which the manager takes the daemon for stuck: two may be late."""


@dataclass(slots=True)
class ServiceManager:
    """The service manager, or nobody if the process was started in another way."""

    address: str = ""
    """Path of its datagram socket; one that begins with `@` is in the abstract namespace. Empty: there is none."""
    watchdog_s: float = 0.0
    """Time without a message after which it restarts the daemon. 0: it does not watch."""

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "ServiceManager":
        """Find the manager by the variables that it gives the processes that it starts."""
        address, limit, pid = (variables.get(name, "") for name in VARIABLES)
        if not address.startswith(("/", "@")):
            return cls()
        watched = limit.isdecimal() and pid in ("", str(os.getpid()))
        return cls(address, int(limit) / 1e6 if watched else 0.0)

    def ready(self, status: str) -> None:
        """Say that the daemon answers."""
        self._send(f"READY=1\nSTATUS={_line(status)}", _WAIT_S)

    def status(self, text: str) -> None:
        """Say what the daemon does."""
        self._send(f"STATUS={_line(text)}")

    def reloading(self) -> None:
        """Say that the settings are read again. `ready` ends that."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(time.monotonic() * 1e6)}")

    def stopping(self, text: str) -> None:
        """Say that the daemon stops."""
        self._send(f"STOPPING=1\nSTATUS={_line(text)}", _WAIT_S)

    async def watch(self) -> None:
        """Say again and again that the event loop runs, until cancelled. A loop that is stuck does not say it."""
        while self.watchdog_s:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / _BEATS_PER_LIMIT)

    def _send(self, message: str, wait_s: float = 0.0) -> None:
        """Send a message. If the manager does not read, wait at most `wait_s` for room; then the message is dropped."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(wait_s)
            sender.sendto(message.encode(), address)


def _line(text: str) -> str:
    return printable(text, _MAX_STATUS)
