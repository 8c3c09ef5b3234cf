"""A daemon from start to stop, in this process: its API, its state folder, and the checks before it starts."""

import asyncio
import dataclasses
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import aiohttp
import pytest

from meshd.agents import supervisor
from meshd.agents.stage.host import StageHost
from meshd.cli import main
from meshd.config import Config
from meshd.daemon.daemon import DaemonInfo, run_daemon
from meshd.errors import ConfigError, LocalFault, StorageError
from meshd.protocol.identity import ClusterKey
from meshd.state import StateFolder, lock_state, read_holder
from meshd.values import Address


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[DaemonInfo]:
    """Run a daemon until the block ends."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    daemon = asyncio.create_task(run_daemon(config, stop=stop, on_ready=ready.set_result))
    try:
        async with asyncio.timeout(60.0):
            await asyncio.wait([daemon, ready], return_when=asyncio.FIRST_COMPLETED)
            if daemon.done():
                await daemon
            yield await ready
    finally:
        stop.set()
        await daemon


async def test_a_daemon_serves_its_api_until_it_is_stopped(local_config: Config) -> None:
    async with running(local_config) as info, aiohttp.ClientSession() as client:
        async with client.get(f"{info.api}/v1/models") as response:
            assert (response.status, (await response.json())["data"]) == (200, [])
        holder = read_holder(local_config.state)
        assert holder is not None
        assert info.api.endswith(holder.api)
        assert (info.probe.cached, info.probe.capability.backend) == (True, "torch")
        assert not info.link.endswith(":0")
    assert read_holder(local_config.state) is None
    async with aiohttp.ClientSession() as client:
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get(f"{info.api}/v1/models")


async def test_the_identity_and_the_cluster_key_survive_a_restart(local_config: Config) -> None:
    async with running(local_config) as first:
        assert first.new_cluster
    async with running(local_config) as second:
        assert not second.new_cluster
    assert (second.peer, second.cluster, second.join_code) == (first.peer, first.cluster, first.join_code)


async def test_a_given_join_code_is_stored_and_another_one_is_refused(local_config: Config) -> None:
    codes = [ClusterKey.generate(lambda count, byte=byte: bytes([byte]) * count).code for byte in (1, 2)]
    async with running(dataclasses.replace(local_config, key=codes[0])) as info:
        assert (info.join_code, info.new_cluster) == (codes[0], False)
    with pytest.raises(ConfigError, match="belongs to cluster") as caught:
        await run_daemon(dataclasses.replace(local_config, key=codes[1]), stop=asyncio.Event())
    assert info.cluster in caught.value.message
    assert "`meshd key join CODE --replace`, then `meshd up`" in caught.value.hint
    assert main(["key", "join", codes[1], "--replace", "--state", str(local_config.state)]) == 0
    async with running(dataclasses.replace(local_config, key=codes[1])) as info:
        assert info.join_code == codes[1]


async def test_a_daemon_lets_threads_take_turns_within_half_a_millisecond(local_config: Config) -> None:
    before = sys.getswitchinterval()
    try:
        async with running(local_config):
            assert sys.getswitchinterval() <= 0.0005
    finally:
        sys.setswitchinterval(before)


async def test_a_state_folder_that_another_daemon_uses_is_refused(local_config: Config) -> None:
    StateFolder.open(local_config.state)
    with lock_state(local_config.state), pytest.raises(StorageError, match="is in use"):
        await run_daemon(local_config, stop=asyncio.Event())
    async with running(local_config):
        pass


async def test_an_open_api_without_a_key_does_not_start(local_config: Config) -> None:
    with pytest.raises(ConfigError, match="without an API key"):
        await run_daemon(dataclasses.replace(local_config, api=Address("0.0.0.0", 0)), stop=asyncio.Event())
    assert not local_config.state.exists()


async def test_a_daemon_whose_agent_keeps_failing_drains_and_ends_with_the_reason(
    local_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = 0

    async def fail(host: StageHost) -> None:
        nonlocal starts
        starts += 1
        raise KeyError(-5)

    monkeypatch.setattr(StageHost, "run", fail)
    monkeypatch.setattr(supervisor, "RESTART_S", 0.01)
    said: list[str] = []
    with pytest.raises(LocalFault, match=r"stopped itself: stages failed 3 times within 0 s, the last time with KeyError: -5"):
        async with asyncio.timeout(60.0):
            await run_daemon(local_config, stop=asyncio.Event(), on_waiting=said.append)
    assert starts >= 3
    assert said[0].startswith("stopping: stages failed 3 times")
    assert read_holder(local_config.state) is None


@pytest.mark.parametrize("address", ["api", "link"])
async def test_a_taken_port_is_reported_before_the_device_is_measured(local_config: Config, address: str) -> None:
    measured: list[str] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        config = dataclasses.replace(local_config, **{address: Address("127.0.0.1", other.getsockname()[1])})
        (local_config.cache / "probe.json").unlink()
        with pytest.raises(ConfigError, match=f"Address already in use; choose another address with --{address} HOST:PORT"):
            await run_daemon(config, stop=asyncio.Event(), on_progress=lambda what, fraction: measured.append(what))
    assert measured == []


async def test_cancelling_frees_the_state_folder(local_config: Config) -> None:
    ready = asyncio.get_running_loop().create_future()
    daemon = asyncio.create_task(run_daemon(local_config, stop=asyncio.Event(), on_ready=ready.set_result))
    async with asyncio.timeout(60.0):
        await ready
        daemon.cancel()
        await asyncio.wait([daemon])
    assert daemon.cancelled()
    assert read_holder(local_config.state) is None
