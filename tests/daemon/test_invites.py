"""What an invite of a device gives."""

import asyncio
import dataclasses

import pytest

from meshd.agents.membership.invites import mdns
from meshd.clock import SystemClock
from meshd.config import Config
from meshd.daemon.invites import inviter_settings
from meshd.peer.peer import Peer
from meshd.protocol.identity import ClusterKey, store_cluster_key
from meshd.state import StateFolder


async def test_an_invite_gives_the_join_code_that_is_stored_when_it_is_asked_for(local_config: Config, peer: Peer) -> None:
    settings = inviter_settings(local_config, peer, SystemClock())
    before = settings.join_code()
    key = ClusterKey.generate(lambda count: bytes(count))
    store_cluster_key(StateFolder(local_config.state), key)
    assert settings.join_code() == key.code != before


@pytest.mark.parametrize(("ways", "advertised"), [(("mdns",), [(7, 40_001)]), (("static",), [])])
async def test_an_invite_is_advertised_only_where_mdns_is_on(
    local_config: Config, peer: Peer, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, ...], advertised: list[tuple[int, int]]
) -> None:
    seen: list[tuple[int, int]] = []

    async def advertise(number: int, port: int, **_: object) -> None:
        seen.append((number, port))
        await asyncio.sleep(0)

    monkeypatch.setattr(mdns, "advertise", advertise)
    settings = inviter_settings(dataclasses.replace(local_config, discovery=ways), peer, SystemClock())
    await settings.advertise(7, 40_001)
    assert seen == advertised
