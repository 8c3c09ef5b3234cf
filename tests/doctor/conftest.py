"""A set-up without faults, as the checks of `meshd doctor` see it, and ways to run them on it."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshd.agents.cluster_service import CheckResult
from meshd.clock import SystemClock
from meshd.config import load_config
from meshd.doctor import CHECKS
from meshd.doctor.check import Context, Runner
from meshd.protocol.identity import ClusterKey, load_identity, store_cluster_key
from meshd.state import StateFolder

QUICK = tuple(check for check in CHECKS if check.id != "backend")
"""All checks but the one that loads the tensor libraries."""
Diagnose = Callable[[Context], list[CheckResult]]


@pytest.fixture
def neighbour() -> Iterator[str]:
    """The address of something that listens, for `--peer`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def context(tmp_path: Path, neighbour: str, unused_tcp_port_factory: Callable[[], int]) -> Context:
    """A device with an identity, free ports, and folders of its own; its system's files are this machine's."""
    flags = {
        "state": str(tmp_path / "state"),
        "cache": str(tmp_path / "cache"),
        "hf-cache": str(tmp_path / "hub"),
        "config": os.devnull,
        "api": f"127.0.0.1:{unused_tcp_port_factory()}",
        "link": f"0.0.0.0:{unused_tcp_port_factory()}",
        "discovery": "static",
        "peer": neighbour,
    }
    for name in ("state", "cache", "hub"):
        (tmp_path / name).mkdir(mode=0o700)
    folder = StateFolder(tmp_path / "state")
    key = ClusterKey.generate(os.urandom)
    store_cluster_key(folder, key)
    load_identity(folder, key, os.urandom)
    return Context(config=load_config(flags, {}), clock=SystemClock(), command=lambda words: None)


@pytest.fixture
def diagnose() -> Diagnose:
    """Runs all quick checks. Returns: everything that they found."""

    async def run(context: Context) -> list[CheckResult]:
        return [result async for step in Runner(QUICK).run(context) for result in step.results]

    return lambda context: asyncio.run(run(context))
