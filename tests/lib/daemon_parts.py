"""The parts of a real daemon's peer, without running the daemon."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshd.agents.device.descriptors import share_descriptors
from meshd.agents.device.probe import probe
from meshd.clock import SystemClock
from meshd.config import Config
from meshd.daemon.device_parts import device_parts
from meshd.daemon.sockets import Sockets
from meshd.peer.parts import Parts
from meshd.protocol.identity import choose_cluster_key, load_identity
from meshd.state import StateFolder
from meshd.telemetry import Telemetry

DESCRIPTORS = 1024


@asynccontextmanager
async def made_parts(config: Config) -> AsyncIterator[Parts]:
    """Make the parts as a daemon does, with links that listen nowhere yet."""
    clock = SystemClock()
    folder = StateFolder.open(config.state)
    cluster, _ = choose_cluster_key(folder, None, clock.random_bytes)
    identity = load_identity(folder, cluster, clock.random_bytes)
    measured = await probe(config.cache, clock=clock, threads=1, backend="torch")
    shares = share_descriptors(DESCRIPTORS)
    parts = device_parts(config, identity, measured, clock, Telemetry(), Sockets([], []), shares)
    try:
        yield parts
    finally:
        parts.compute.close()
