"""Hugging Face's own library against a local server with the Hub's API."""

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from meshd.errors import DownloadError, ModelFileError
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store
from tiny.hf_folders import write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A server with one repository, `org/tiny`. `served` are the files that were downloaded."""

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
    steps: list[PullProgress] = []
    model = await store.pull("hf:org/tiny@main:tiny.gguf", steps.append)
    content = hub.files["tiny.gguf"]
    assert model.path.is_relative_to(tmp_path / "hf")
    assert (model.sha256, model.size_bytes, model.in_place) == (hashlib.sha256(content).hexdigest(), len(content), True)
    downloaded = [step for step in steps if step.phase is PullPhase.DOWNLOADING]
    assert (downloaded[-1].done_bytes, downloaded[-1].total_bytes) == (len(content), len(content))
    with store.open(model) as file:
        assert "token_embd.weight" in file


async def test_a_repository_with_one_model_needs_no_file_name(store: Store, hub: Hub) -> None:
    assert (await store.pull("hf:org/tiny")).name == "hf:org/tiny"
    hub.files["other.gguf"] = b""
    with pytest.raises(DownloadError, match=r"other\.gguf, tiny\.gguf"):
        await store.pull("hf:org/tiny@main")


async def test_a_file_in_the_cache_is_not_fetched_again(store: Store, hub: Hub, tmp_path: Path) -> None:
    await store.pull("hf:org/tiny:tiny.gguf")
    other = Store(tmp_path / "other", tmp_path / "hf", hf_endpoint=hub.url)
    await other.pull("hf:org/tiny:tiny.gguf")
    assert hub.served == ["tiny.gguf"]
    assert other.remove("hf:org/tiny:tiny.gguf") == 0


async def test_a_failed_fetch_is_an_error_of_one_line(store: Store, hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"missing\.gguf") as caught:
        await store.pull("hf:org/tiny:missing.gguf")
    assert "\n" not in str(caught.value)
    with pytest.raises(DownloadError, match="org/nothing"):
        await store.pull("hf:org/nothing:x.gguf")
    hub.files["bad.gguf"] = b"not a model"
    with pytest.raises(ModelFileError):
        await store.pull("hf:org/tiny:bad.gguf")


async def test_safetensors_are_fetched_with_their_other_files_and_imported(store: Store, hub: Hub, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "made", dtype="BF16", shards=2)
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"tiny", "pytorch_model.bin": b"pickle"}
    steps: list[PullProgress] = []
    model = await store.pull("hf:org/tiny", steps.append)
    assert {path.name for path in folder.iterdir()} == set(hub.served)
    total = sum(len(hub.files[name]) for name in hub.served)
    downloading = [step for step in steps if step.phase is PullPhase.DOWNLOADING]
    assert {step.total_bytes for step in downloading} == {total}
    assert [step.done_bytes for step in downloading] == sorted(step.done_bytes for step in downloading)
    assert downloading[-1].done_bytes == total
    assert (model.name, model.in_place, model.path.parent) == ("hf:org/tiny", False, tmp_path / "models")
    local = await store.pull(f"file:{folder}")
    assert local.id == model.id
    served = list(hub.served)
    small = await store.pull("hf:org/tiny+q8")
    assert small.size_bytes < model.size_bytes
    assert hub.served == served
    assert await store.pull("hf:org/tiny") == model


async def test_all_parts_of_a_split_file_are_fetched_and_joined(store: Store, hub: Hub, make_llama: Callable[..., Any]) -> None:
    tensors = list(make_llama().tensors.items())
    common = {"split.count": (4, 2), "split.tensors.count": (4, len(tensors))}
    parts = [make_llama().metadata | common | {"split.no": (4, number)} for number in range(2)]
    hub.files = {
        f"tiny-{number + 1:05}-of-00002.gguf": type(make_llama())(
            metadata=parts[number], tensors=dict(tensors[:7] if number == 0 else tensors[7:])
        ).build()
        for number in range(2)
    }
    model = await store.pull("hf:org/tiny")
    with store.open(model) as file:
        assert list(file.tensors) == list(make_llama().tensors)
    assert hub.served == sorted(hub.files)
    del hub.files["tiny-00002-of-00002.gguf"]
    with pytest.raises(DownloadError, match="00002-of-00002"):
        await store.pull("hf:org/tiny:tiny-00001-of-00002.gguf")
