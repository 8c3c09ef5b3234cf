"""The measured times of layers are found again by what decides them, and a torn file costs a measurement only."""

from pathlib import Path

import pytest

from meshd.agents.placement.ready.layer_times import FILE, LayersKey, LayerTimes, LayerTimesFile
from meshd.errors import StorageError
from meshd.numerics import NumericsId
from meshd.state import MemoryFolder, StateFolder
from meshd.types import LayerRange, ModelId

KEY = LayersKey(
    model=ModelId("a" * 32), layers=LayerRange(0, 4), numerics=NumericsId("onnxruntime/int8/512/0123456789abcdef"), threads=2
)
TIMES = LayerTimes(layer_decode_s=1e-3, layer_prefill_s=1e-4, head_s=5e-3, attention_token_s=1e-7)


def key(threads: int) -> LayersKey:
    return LayersKey(model=KEY.model, layers=KEY.layers, numerics=KEY.numerics, threads=threads)


def test_another_process_finds_what_was_saved_and_nothing_else(tmp_path: Path) -> None:
    LayerTimesFile(StateFolder(tmp_path)).save(KEY, TIMES)
    found = LayerTimesFile(StateFolder(tmp_path))
    assert found.find(KEY) == TIMES
    others = (
        key(3),
        LayersKey(model=ModelId("b" * 32), layers=KEY.layers, numerics=KEY.numerics, threads=2),
        LayersKey(model=KEY.model, layers=LayerRange(0, 5), numerics=KEY.numerics, threads=2),
        LayersKey(model=KEY.model, layers=KEY.layers, numerics=NumericsId("torch/f32/512/0123456789abcdef"), threads=2),
        LayersKey(format=0, model=KEY.model, layers=KEY.layers, numerics=KEY.numerics, threads=2),
    )
    assert [found.find(other) for other in others] == [None] * len(others)


def test_the_newest_records_stay_and_the_file_is_bounded() -> None:
    folder = MemoryFolder()
    times = LayerTimesFile(folder)
    for threads in range(100):
        times.save(key(threads), TIMES)
    times.save(key(99), LayerTimes(layer_decode_s=2e-3, layer_prefill_s=1e-4))
    assert times.find(key(0)) is None
    assert times.find(key(60)) == TIMES
    newest = times.find(key(99))
    assert newest is not None
    assert newest.layer_decode_s == 2e-3
    assert len(folder.files[FILE]) < 64 * 600


@pytest.mark.parametrize("content", [b"", b"[{", b'[{"key": 1}]', b"\xff\x00"])
def test_a_torn_file_is_as_good_as_none_and_is_replaced(content: bytes) -> None:
    times = LayerTimesFile(MemoryFolder([(FILE, content)]))
    assert times.find(KEY) is None
    times.save(KEY, TIMES)
    assert times.find(KEY) == TIMES


def test_a_full_disk_costs_the_record_only(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryFolder):
        def write(self, name: str, data: bytes) -> None:
            raise StorageError("no space left on the device")

    LayerTimesFile(Full()).save(KEY, TIMES)
    assert "no space left" in caplog.text
