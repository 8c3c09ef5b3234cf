"""All partial copies of a device: listed, locked, removed."""

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
from tiny.copies import about, bring


def test_copies_are_listed_apart_and_removed_by_name(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    told = about(source)
    bring(store.partials.begin(told), source, [0, 1, 2])
    assert store.list() == []
    assert [copy.about.name for copy in store.partials.list()] == ["tiny"]
    found = store.partials.get(told.id)
    assert found is not None
    assert store.remove("tiny") == found.bytes_here
    assert store.partials.list() == []
    assert store.partials.get(told.id) is None
    with pytest.raises(UnknownModel):
        store.remove("tiny")


async def test_a_copy_is_filled_by_one_at_a_time_and_not_removed_meanwhile(
    source: Path, tmp_path: Path, instant_clock: Any
) -> None:
    told = about(source)
    mine, other = Partials(tmp_path / "parts", SystemClock()), Partials(tmp_path / "parts", instant_clock)
    entered = False

    async def wait() -> None:
        nonlocal entered
        async with other.filling(told.id):
            entered = True

    async with mine.filling(told.id):
        bring(mine.begin(told), source, [0])
        waiting = asyncio.create_task(wait())
        while len(instant_clock.pauses) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not entered
        assert other.remove("tiny") == 0
    await waiting
    assert entered
    assert other.remove("tiny") > 0


@pytest.mark.parametrize("name", ["../../etc", "", "A" * 32, "tiny"])
async def test_what_is_no_models_id_names_no_folder(tmp_path: Path, name: str) -> None:
    partials = Partials(tmp_path / "parts", SystemClock())
    assert partials.get(ModelId(name)) is None
    with pytest.raises(UnknownModel):
        async with partials.filling(ModelId(name)):
            pass
    assert not (tmp_path / "parts").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partials = Partials(tmp_path / "parts", SystemClock())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StorageError, match="too little room"):
        partials.begin(about(source))
    assert partials.list() == []
