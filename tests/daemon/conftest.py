"""A peer of a real daemon that does not run."""

from collections.abc import AsyncIterator

import pytest

from daemon_parts import made_parts
from meshd.config import Config
from meshd.peer.compose import compose
from meshd.peer.peer import Peer


@pytest.fixture
async def peer(local_config: Config) -> AsyncIterator[Peer]:
    async with made_parts(local_config) as parts:
        yield compose(parts)
