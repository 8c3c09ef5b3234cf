"""A daemon from start to stop, in this process: its API, its state folder, and the checks before it starts."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from meshd.cli import main
from meshd.config import Config
from meshd.daemon import DaemonInfo, run_daemon
from meshd.errors import ConfigError, StorageError
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


async def test_cancelling_frees_the_state_folder(local_config: Config) -> None:
    ready = asyncio.get_running_loop().create_future()
    daemon = asyncio.create_task(run_daemon(local_config, stop=asyncio.Event(), on_ready=ready.set_result))
    async with asyncio.timeout(60.0):
        await ready
        daemon.cancel()
        await asyncio.wait([daemon])
    assert daemon.cancelled()
    assert read_holder(local_config.state) is None
