"""The partial copies of a device: listing, locking and removing them."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from meshd.clock import SystemClock
from meshd.errors import StorageError, UnknownModel
from meshd.models.files import disk as files
from meshd.models.store.partial_copies import Partials
from meshd.models.store.store import Store
from meshd.types import ModelId
from tiny.copies import copy_info, fill


def test_copies_are_not_listed_as_models_and_are_removed_by_name(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    info = copy_info(source)
    fill(store.partials.begin(info), source, [0, 1, 2])
    assert store.list() == []
    assert [copy.about.name for copy in store.partials.list()] == ["tiny"]
    found = store.partials.get(info.id)
    assert found is not None
    assert store.remove("tiny") == found.bytes_here
    assert store.partials.list() == []
    assert store.partials.get(info.id) is None
    with pytest.raises(UnknownModel):
        store.remove("tiny")


async def test_a_copy_has_one_writer_and_is_not_removed_while_it_is_filled(
    source: Path, tmp_path: Path, instant_clock: Any
) -> None:
    info = copy_info(source)
    mine, other = Partials(tmp_path / "parts", SystemClock()), Partials(tmp_path / "parts", instant_clock)
    entered = False

    async def wait() -> None:
        nonlocal entered
        async with other.filling(info.id):
            entered = True

    async with mine.filling(info.id):
        fill(mine.begin(info), source, [0])
        waiting = asyncio.create_task(wait())
        while len(instant_clock.pauses) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not entered
        assert other.remove("tiny") == 0
    await waiting
    assert entered
    assert other.remove("tiny") > 0


@pytest.mark.parametrize("name", ["../../etc", "", "A" * 32, "tiny"])
async def test_an_invalid_model_id_names_no_folder(tmp_path: Path, name: str) -> None:
    partials = Partials(tmp_path / "parts", SystemClock())
    assert partials.get(ModelId(name)) is None
    with pytest.raises(UnknownModel):
        async with partials.filling(ModelId(name)):
            pass
    assert not (tmp_path / "parts").exists()


def test_a_full_disk_is_an_error_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partials = Partials(tmp_path / "parts", SystemClock())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StorageError, match="too little room"):
        partials.begin(copy_info(source))
    assert partials.list() == []
