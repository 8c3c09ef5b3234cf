"""The record of what is placed: what it survives, its limits, and what ends an entry."""

import logging
from pathlib import Path

import msgspec
import pytest

from in_process.adverts import advert, held
from meshd.agents.placement.restart.placements import (
    MAX_PLACED,
    MAX_UNPLACED,
    NAME,
    PlacedLayers,
    Placements,
    restored_though_unplaced,
)
from meshd.state import MemoryFolder, StateFolder
from meshd.types import LayerRange, ModelId

MODEL = ModelId("a" * 32)


def entry(start: int, end: int, model: ModelId = MODEL) -> PlacedLayers:
    return PlacedLayers(model=model, name="m", ref="file:/m.gguf", layers=LayerRange(start, end), kv_tokens=64)


def test_the_record_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    folder = StateFolder.open(tmp_path)
    record = Placements(folder)
    record.add(entry(0, 12))
    record.end(ModelId("b" * 32))
    record.save()
    again = Placements(folder)
    assert again.placed == (entry(0, 12),)
    assert ModelId("b" * 32) in again.unplaced
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("data", [b"{", b'{"placed": [{"model": 3}]}', b"\xff" * 100])
def test_a_torn_record_is_one_warning_and_an_empty_record(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        record = Placements(MemoryFolder([(NAME, data)]))
    assert (record.placed, len(caplog.records)) == ((), 1)
    record.add(entry(0, 2))
    record.save()


def test_layers_replace_those_that_they_contain() -> None:
    record = Placements(MemoryFolder())
    for layers in ((0, 2), (2, 4), (0, 4), (4, 6)):
        record.add(entry(*layers))
    assert [str(each.layers) for each in record.placed] == ["0-4", "4-6"]


def test_unplacing_a_model_ends_all_its_entries_until_it_is_placed_again() -> None:
    record = Placements(MemoryFolder())
    record.add(entry(0, 2))
    record.add(entry(4, 6))
    record.end(MODEL)
    assert (record.placed, MODEL in record.unplaced) == ((), True)
    record.add(entry(0, 2))
    assert (record.placed, MODEL in record.unplaced) == ((entry(0, 2),), False)


def test_the_record_is_bounded() -> None:
    folder = MemoryFolder()
    record = Placements(folder)
    for number in range(200):
        record.add(entry(0, 1, ModelId(f"{number:032x}")))
        record.end(ModelId(f"{number + 1000:032x}"))
    assert len(record.placed) == MAX_PLACED
    record.save()
    document = msgspec.json.decode(folder.files[NAME])
    assert (len(document["placed"]), len(document["unplaced"])) == (MAX_PLACED, MAX_UNPLACED)


def test_a_record_that_did_not_change_is_not_written(tmp_path: Path) -> None:
    folder = MemoryFolder()
    record = Placements(folder)
    record.add(entry(0, 1))
    record.save()
    folder.files.clear()
    record.save()
    assert folder.files == {}


def test_a_model_that_was_unplaced_while_a_peer_was_off_is_found_in_what_that_peer_restored() -> None:
    record = Placements(MemoryFolder())
    record.end(MODEL)
    restored = msgspec.structs.replace(held(0, 2, model=MODEL), restored=True)
    adverts = [
        msgspec.structs.replace(advert("b"), holdings=(restored,)),
        msgspec.structs.replace(advert("c"), holdings=(held(2, 4, model=MODEL),)),
    ]
    assert restored_though_unplaced(adverts, record) == [(adverts[0].peer, MODEL)]
    assert restored_though_unplaced(adverts, Placements(MemoryFolder())) == []
