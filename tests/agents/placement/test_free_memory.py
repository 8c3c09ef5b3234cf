"""Free memory: reservations, memory that other processes took, and the age of the measurement."""

import errno

import pytest

from in_process.adverts import CARD
from in_process.journals import HandClock
from meshd.agents.placement.free_memory import FreeMemory
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.share import KvShare
from meshd.types import LayerRange

LAYERS = LayerRange(0, 2)
RESIDENT = ResidentLayers(CARD, LAYERS, kv_tokens=64, weight_bytes=1000, state=LoadState.ACTIVE)
RESERVED = RESIDENT.reserved_bytes


class Machine:
    """Returns the free bytes that the test sets, and counts the measurements."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.measurements = 0
        self.failure: OSError | None = None

    def __call__(self) -> int:
        self.measurements += 1
        if self.failure is not None:
            raise self.failure
        return self.free_bytes


def test_every_reservation_counts_before_its_memory_is_touched() -> None:
    machine = Machine(10 * RESERVED)
    holdings = ResidentModels(HostArena(1 << 30), [RESIDENT])
    assert FreeMemory(10 * RESERVED, holdings, machine, HandClock()).free_bytes() == 9 * RESERVED


def test_memory_that_other_processes_took_is_not_free() -> None:
    loaded = ResidentLayers(CARD, LAYERS, kv_tokens=64, weight_bytes=1000, state=LoadState.ACTIVE)
    loaded.kv = KvShare(HostArena(1 << 30), CARD.id, CARD.spec, LAYERS, 64)
    untouched = loaded.kv.bytes
    assert 0 < untouched < RESERVED
    memory = FreeMemory(10 * RESERVED, ResidentModels(HostArena(1 << 30), [loaded]), Machine(untouched + 5), HandClock())
    assert memory.free_bytes() == 5


def test_free_memory_is_never_negative() -> None:
    assert (
        FreeMemory(RESERVED - 1, ResidentModels(HostArena(1 << 30), [RESIDENT]), Machine(10 * RESERVED), HandClock()).free_bytes()
        == 0
    )
    assert FreeMemory(10 * RESERVED, ResidentModels(HostArena(1 << 30), [RESIDENT]), Machine(0), HandClock()).free_bytes() == 0


async def test_a_measurement_is_used_for_a_second() -> None:
    machine, clock = Machine(100), HandClock()
    memory = FreeMemory(1000, ResidentModels(HostArena(1 << 30)), machine, clock)
    assert memory.free_bytes() == 100
    machine.free_bytes = 50
    await clock.move(1.0)
    assert memory.free_bytes() == 100
    await clock.move(0.1)
    assert memory.free_bytes() == 50
    assert machine.measurements == 2


def test_a_forgotten_measurement_is_made_again_at_once() -> None:
    machine = Machine(100)
    memory = FreeMemory(1000, ResidentModels(HostArena(1 << 30)), machine, HandClock())
    assert memory.free_bytes() == 100
    machine.free_bytes = 50
    memory.forget()
    assert memory.free_bytes() == 50


async def test_the_last_figure_is_used_while_memory_cannot_be_measured(caplog: pytest.LogCaptureFixture) -> None:
    machine, clock = Machine(100), HandClock()
    memory = FreeMemory(1000, ResidentModels(HostArena(1 << 30)), machine, clock)
    assert memory.free_bytes() == 100
    machine.failure = OSError(errno.EMFILE, "Too many open files", "/proc/meminfo")
    for _ in range(3):
        await clock.move(2.0)
        assert memory.free_bytes() == 100
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "/proc/meminfo" in caplog.text
    machine.failure, machine.free_bytes = None, 70
    await clock.move(2.0)
    assert memory.free_bytes() == 70


def test_before_the_first_measurement_the_figure_of_the_start_is_used() -> None:
    machine = Machine(100)
    machine.failure = OSError(errno.EMFILE, "Too many open files", "/proc/meminfo")
    assert FreeMemory(1000, ResidentModels(HostArena(1 << 30)), machine, HandClock()).free_bytes() == 1000
