"""OpenAI's own client, unmodified, against two real daemons that share a model."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from fake_api.openai_suite import *  # noqa: F403
from fake_api.responses_suite import *  # noqa: F403
from real_daemons.cluster import MODEL, make_cluster


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[str]:
    for cluster in make_cluster(tmp_path_factory.mktemp("openai"), shared_cache):
        cluster.start("a", "b")
        cluster.see_each_other()
        cluster.place("a", stages="b:0-14,a:14-30")
        yield cluster["a"].api


@pytest.fixture
def model() -> str:
    return MODEL


@pytest.fixture
def api_key() -> None:
    return None


@pytest.fixture
async def openai_client(base_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
