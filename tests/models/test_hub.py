"""Hugging Face's own library against a server of this machine that speaks as the Hub does."""

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from meshd.errors import DownloadError, ModelFileError
from meshd.models.progress import PullPhase, PullProgress
from meshd.models.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, `org/tiny`."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)

    async def tree(self, request: web.Request) -> web.Response:
        entry = {"type": "file", "oid": COMMIT, "size": 1}
        return web.json_response([entry | {"path": name} for name in self.files])

    async def file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if name not in self.files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if request.method == "GET":
            self.served.append(name)
        return web.Response(body=content, headers=headers)


@pytest.fixture
async def hub(make_llama: Callable[..., Any]) -> AsyncIterator[Hub]:
    hub = Hub(files={"README.md": b"tiny", "tiny.gguf": make_llama().build()})
    app = web.Application()
    app.router.add_get("/api/models/org/tiny/tree/{revision}", hub.tree)
    app.router.add_get("/org/tiny/resolve/{revision}/{file}", hub.file)
    async with TestServer(app) as server:
        hub.url = str(server.make_url("")).rstrip("/")
        yield hub


@pytest.fixture
def store(tmp_path: Path, hub: Hub) -> Store:
    return Store(tmp_path / "models", tmp_path / "hf", hf_endpoint=hub.url)


async def test_a_file_is_fetched_into_the_shared_cache(store: Store, hub: Hub, tmp_path: Path) -> None:
    told: list[PullProgress] = []
    model = await store.pull("hf:org/tiny@main:tiny.gguf", told.append)
    content = hub.files["tiny.gguf"]
    assert model.path.is_relative_to(tmp_path / "hf")
    assert (model.sha256, model.size_bytes, model.in_place) == (hashlib.sha256(content).hexdigest(), len(content), True)
    downloaded = [step for step in told if step.phase is PullPhase.DOWNLOADING]
    assert (downloaded[-1].done_bytes, downloaded[-1].total_bytes) == (len(content), len(content))
    with store.open(model) as file:
        assert "token_embd.weight" in file


async def test_a_repository_with_one_model_needs_no_file_name(store: Store, hub: Hub) -> None:
    assert (await store.pull("hf:org/tiny")).name == "hf:org/tiny"
    hub.files["other.gguf"] = b""
    with pytest.raises(DownloadError, match=r"other\.gguf, tiny\.gguf"):
        await store.pull("hf:org/tiny@main")


async def test_what_the_cache_holds_is_not_fetched_again(store: Store, hub: Hub, tmp_path: Path) -> None:
    await store.pull("hf:org/tiny:tiny.gguf")
    other = Store(tmp_path / "other", tmp_path / "hf", hf_endpoint=hub.url)
    await other.pull("hf:org/tiny:tiny.gguf")
    assert hub.served == ["tiny.gguf"]
    assert other.remove("hf:org/tiny:tiny.gguf") == 0


async def test_what_can_not_be_had_is_told_in_one_line(store: Store, hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"missing\.gguf") as caught:
        await store.pull("hf:org/tiny:missing.gguf")
    assert "\n" not in str(caught.value)
    with pytest.raises(DownloadError, match="org/nothing"):
        await store.pull("hf:org/nothing:x.gguf")
    hub.files["bad.gguf"] = b"not a model"
    with pytest.raises(ModelFileError):
        await store.pull("hf:org/tiny:bad.gguf")
