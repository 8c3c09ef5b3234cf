"""Forks daemons from a process that has imported their libraries. This saves the imports, 2.5 s of CPU time for each start.

Otherwise a forked daemon is like one that a user starts: a process with its own arguments, environment, files and signals. Tests of
`meshd up` itself, of the demo and of memory run the command instead.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

_PRELOAD = [
    "meshd.daemon.daemon",
    "meshd.cli.up",
    "meshd.kernels.ort.backend",
    "meshd.kernels.torch.backend",
    "real_daemons.forked",
]
_NO_THREAD = "ORT_DISABLE_TELEMETRY"
"""Variable without which the import of onnxruntime starts a thread. A forked process would not have this thread."""
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


class Process(Protocol):
    """The part of the interface of `subprocess.Popen` that tests use."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class ForkedProcess:
    """A forked process with the interface of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess, command: Sequence[str], stdin: Connection) -> None:
        assert process.pid is not None
        self._process = process
        self._command = command
        self._stdin = stdin
        self.pid = process.pid

    def poll(self) -> int | None:
        status = self._process.exitcode
        if status is not None:
            self._stdin.close()
        return status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end. Returns: its exit status. Raises: subprocess.TimeoutExpired."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(list(self._command), timeout)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, host: tuple[str, str] | None = None
) -> ForkedProcess:
    """Run `python [-P] -m MODULE ...` or `python [-P] SCRIPT ...` in a forked process.

    Its output and errors are appended to `log`. Its input is a pipe that the kernel closes when the test process ends, even by a
    signal. `host` is the path of a network namespace for the process, and a host name. `environment` defaults to this process's.
    """
    words = [word for word in command[1:] if word != "-P"]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOAD)
    with patch.dict(os.environ, {_NO_THREAD: "1"}):
        ensure_running()
    reader, writer = server.Pipe(duplex=False)
    arguments = (words, reader, str(log), dict(os.environ if environment is None else environment), host)
    process = server.Process(target=_run, args=arguments, daemon=True)
    process.start()
    reader.close()
    return ForkedProcess(process, command, writer)


def _run(words: list[str], stdin: Connection, log: str, environment: dict[str, str], host: tuple[str, str] | None) -> None:
    """Run the command. Called in the forked process."""
    os.setsid()
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(environment)
    if host is not None:
        _enter(*host)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def enter_network(namespace: int) -> None:
    """Move this thread into the network namespace of an open descriptor. Raises: OSError."""
    _check(ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET), "cannot enter the network namespace")


def _enter(namespace: str, name: str) -> None:
    """Move this process into a network namespace and give it a host name of its own. Raises: OSError."""
    with open(namespace) as network:
        enter_network(network.fileno())
    _check(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUTS), "cannot have a host name of its own")
    socket.sethostname(name)


def _check(result: int, failure: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), failure)
