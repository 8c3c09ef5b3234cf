"""The parts of a real daemon that does not run."""

from collections.abc import AsyncIterator

import pytest

from daemon_parts import made_parts
from meshd.config import Config
from meshd.peer.parts import Parts


@pytest.fixture
async def parts(local_config: Config) -> AsyncIterator[Parts]:
    async with made_parts(local_config) as made:
        yield made
