"""The parts of this device's peer."""

import dataclasses

from daemon_parts import DESCRIPTORS, made_parts
from meshd.agents.device.descriptors import share_descriptors
from meshd.config import Config
from meshd.state import StateFolder


async def test_the_settings_reach_the_parts(local_config: Config) -> None:
    config = dataclasses.replace(local_config, name="desk", copies=3, max_sessions=5, queue_limit=7, mirror=True)
    async with made_parts(config) as parts:
        settings = parts.settings
        assert (parts.name, settings.copies, settings.max_sessions, settings.queue_limit) == ("desk", 3, 5, 7)
        assert settings.mirror
        assert parts.capability.backend == parts.backend.name == "torch"


async def test_links_get_their_share_of_the_descriptors(local_config: Config) -> None:
    async with made_parts(local_config) as parts:
        assert parts.links._settings.max_links == share_descriptors(DESCRIPTORS).links


async def test_the_keys_of_the_parts_are_those_in_the_state_folder(local_config: Config) -> None:
    async with made_parts(local_config) as first:
        assert StateFolder(local_config.state).path.exists()
    async with made_parts(local_config) as second:
        pass
    assert second.me == first.me == second.trust.me
    assert second.trust.key == first.trust.key
    assert second.incarnation != first.incarnation
