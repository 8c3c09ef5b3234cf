"""Joining a cluster by an invite, before the daemon starts."""

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest

from in_process.invites import LINK_PORT, make_inviter, open_invite
from meshd.cli.support.joining import join_cluster
from meshd.config import Config
from meshd.errors import ConfigError, StorageError
from meshd.protocol.identity import ClusterKey, load_cluster_key, store_cluster_key
from meshd.state import StateFolder, lock_state
from meshd.values import Address

KEY = ClusterKey.generate(os.urandom)
CODE = "7-amber-lion"


async def test_the_key_of_the_inviter_is_stored_and_its_link_address_returned(local_config: Config, tmp_path: Path) -> None:
    async with open_invite(make_inviter(tmp_path, join_code=KEY.code)) as opened:
        link = await asyncio.to_thread(join_cluster, f"{opened.code}@127.0.0.1:{opened.port}", local_config)
        assert (await opened.end()).state == "joined"
    assert load_cluster_key(StateFolder(local_config.state)) == KEY
    assert link == Address("127.0.0.1", LINK_PORT)


def test_a_device_of_a_cluster_is_told_how_to_leave_it(local_config: Config) -> None:
    store_cluster_key(StateFolder.open(local_config.state), KEY)
    with pytest.raises(ConfigError, match=f"belongs to cluster {KEY.fingerprint} already") as caught:
        join_cluster(CODE, local_config)
    assert "--state DIR" in caught.value.hint


def test_a_running_daemon_is_not_given_another_cluster(local_config: Config) -> None:
    StateFolder.open(local_config.state)
    with lock_state(local_config.state), pytest.raises(StorageError, match="in use"):
        join_cluster(CODE, local_config)


def test_two_ways_to_join_at_once_are_refused(local_config: Config) -> None:
    with pytest.raises(ConfigError, match="both say which cluster"):
        join_cluster(CODE, dataclasses.replace(local_config, key=KEY.code))


@pytest.mark.parametrize(("address", "fault"), [("host", "has no port"), ("host:x", "is wrong"), ("", "is wrong")])
def test_an_address_that_is_mistyped_is_named_before_anything_is_stored(local_config: Config, address: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        join_cluster(f"{CODE}@{address}", local_config)
    assert not local_config.state.exists()
