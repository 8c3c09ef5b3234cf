"""The cache of measurements, and the lock so that only one daemon measures at a time."""

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from meshd.agents.device.probe_record import (
    CACHE_FILE,
    FORMAT,
    BackendTrial,
    ProbeKey,
    ProbeRecord,
    load_record,
    measurement_lock,
    save_record,
)
from meshd.clock import SystemClock
from meshd.types import Rates

CLOCK = SystemClock()
RATES = Rates(
    decode_bytes_s=1e9, prefill_flops_s=1e10, memory_bytes_s=1e10, attention_bytes_s=1e9, disk_bytes_s=0.0, layer_overhead_s=1e-4
)


def key(threads: int = 2) -> ProbeKey:
    return ProbeKey(
        format=FORMAT,
        machine="x86_64",
        processor="cpu",
        features="0123456789abcdef",
        memory_bytes=8,
        cores=4,
        threads=threads,
        backends=("torch",),
        software={"torch": "2.6"},
        environment={},
    )


def record(threads: int = 2, disk_bytes_s: float = 1e8) -> ProbeRecord:
    return ProbeRecord(
        key=key(threads), trials=(BackendTrial(backend="torch", rates=RATES),), disk_bytes_s=disk_bytes_s, measured_at=1.0
    )


def test_a_record_is_found_by_its_whole_key(tmp_path: Path) -> None:
    save_record(tmp_path, record())
    assert load_record(tmp_path, key()) == record()
    assert load_record(tmp_path, key(threads=3)) is None
    assert load_record(tmp_path, msgspec.structs.replace(key(), software={"torch": "2.7"})) is None


def test_a_record_replaces_one_with_the_same_key_and_the_ninth_drops_the_oldest(tmp_path: Path) -> None:
    save_record(tmp_path, record())
    save_record(tmp_path, record(disk_bytes_s=2e8))
    assert load_record(tmp_path, key()) == record(disk_bytes_s=2e8)
    for threads in range(10, 17):
        save_record(tmp_path, record(threads))
    assert load_record(tmp_path, key()) is not None
    save_record(tmp_path, record(17))
    assert load_record(tmp_path, key()) is None
    assert load_record(tmp_path, key(10)) is not None


@pytest.mark.parametrize("content", [b"", b"[{", b'{"an": "object"}', b'[{"key": 1}]', b"\xff"])
def test_a_damaged_file_has_no_records_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CACHE_FILE).write_bytes(content)
    (tmp_path / CACHE_FILE).chmod(0o600)
    assert load_record(tmp_path, key()) is None
    save_record(tmp_path, record())
    assert load_record(tmp_path, key()) == record()


@pytest.mark.parametrize(
    ("trial", "layer_s"),
    [
        (BackendTrial(backend="torch", rates=RATES), 16 * 2**20 / 1e9 + 1e-4),
        (BackendTrial(backend="torch", error="broken"), float("inf")),
        (BackendTrial(backend="torch", rates=msgspec.structs.replace(RATES, decode_bytes_s=0.0)), float("inf")),
    ],
)
def test_a_backend_without_a_rate_is_infinitely_slow(trial: BackendTrial, layer_s: float) -> None:
    assert trial.layer_s == pytest.approx(layer_s)


async def test_only_one_measures_at_a_time(tmp_path: Path) -> None:
    running, most = 0, 0

    async def measure() -> None:
        nonlocal running, most
        async with measurement_lock(tmp_path / "new", CLOCK, 30.0):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1

    async with asyncio.timeout(10.0), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(measure())
    assert most == 1


async def test_a_process_that_was_killed_while_it_measured_blocks_no_other(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from meshd.agents.device.probe_record import measurement_lock\n"
        "from meshd.clock import SystemClock\n"
        "async def main():\n"
        "    async with measurement_lock(pathlib.Path(sys.argv[1]), SystemClock(), 1.0):\n"
        "        print('held', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    waits: list[float] = []

    class KillingClock(SystemClock):
        async def sleep(self, seconds: float) -> None:
            waits.append(seconds)
            other.kill()
            await other.wait()

    other = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE)
    assert other.stdout is not None
    assert await other.stdout.readline() == b"held\n"
    async with asyncio.timeout(10.0), measurement_lock(tmp_path, KillingClock(), 30.0):
        assert len(waits) == 1


async def test_a_measurement_that_never_ends_does_not_block_others_forever(tmp_path: Path) -> None:
    async with measurement_lock(tmp_path, CLOCK, 1.0), asyncio.timeout(5.0), measurement_lock(tmp_path, CLOCK, 0.0):
        pass


async def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        async with measurement_lock(tmp_path / "file/below", CLOCK, 0.0):
            pass
