"""Kept outputs: they are returned unchanged, stay within the budget, and are contiguous."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.stage.outputs import OutputLog, Outputs
from meshd.errors import LocalFault

WIDTH = 16


def hidden(start: int, tokens: int, mark: float = 0) -> np.ndarray:
    """Make rows `[tokens, WIDTH]`. Each value is the row's position plus `mark`."""
    return np.repeat(np.arange(start, start + tokens, dtype=np.float32)[:, None], WIDTH, 1) + np.float32(mark)


def encoded(start: int, tokens: int, mark: float = 0) -> memoryview:
    return hidden(start, tokens, mark).data.cast("B")


def kept_range(log: OutputLog) -> tuple[int, int]:
    return log.kept_from, log.kept_to


def filled(outputs: Outputs, *sizes: int) -> OutputLog:
    log = outputs.open("f32")
    for size in sizes:
        outputs.append(log, log.kept_to, size, encoded(log.kept_to, size))
    return log


def test_any_range_of_kept_positions_is_returned() -> None:
    log = filled(Outputs(1 << 20), 5, 1, 1, 7, 1)
    for start in range(15):
        for end in range(start + 1, 16):
            assert log.rows(start, end) == hidden(start, end - start).tobytes()
    for start, end in ((0, 16), (-1, 3), (4, 4), (5, 4)):
        with pytest.raises(LocalFault):
            log.rows(start, end)


def test_rows_of_one_step_are_returned_without_a_copy() -> None:
    outputs = Outputs(1 << 20)
    log, part = outputs.open("f32"), encoded(0, 4)
    outputs.append(log, 0, 4, part)
    assert log.rows(1, 4).obj is part.obj


def test_a_gap_clears_the_log() -> None:
    outputs = Outputs(1 << 20)
    log = filled(outputs, 5)
    outputs.append(log, 7, 2, encoded(7, 2))
    assert kept_range(log) == (7, 9)
    outputs.drop(log)
    assert outputs.used_bytes == 0


@pytest.mark.parametrize("end", [0, 1, 5, 6, 9, 12, 20])
def test_positions_that_were_cut_can_be_appended_again(end: int) -> None:
    outputs = Outputs(1 << 20)
    log = filled(outputs, 5, 1, 6)
    outputs.cut(log, end)
    assert kept_range(log) == (0, min(end, 12))
    outputs.append(log, end, 3, encoded(end, 3, mark=0.5))
    assert kept_range(log) == (0 if end <= 12 else 20, end + 3)
    assert log.rows(end, end + 3) == hidden(end, 3, mark=0.5).tobytes()
    outputs.drop(log)
    outputs.drop(log)
    assert outputs.used_bytes == 0


def test_the_least_recently_used_log_is_evicted_first() -> None:
    outputs = Outputs(10_000)
    first, second = filled(outputs, 40), filled(outputs, 40)
    outputs.append(first, 40, 1, encoded(40, 1))
    third = filled(outputs, 70)
    assert kept_range(first) == (0, 41)
    assert kept_range(second) == (40, 40)
    assert kept_range(third) == (0, 70)
    outputs.append(second, 40, 1, encoded(40, 1))
    assert kept_range(second) == (40, 41), "an evicted log continues at the position of its stage"


def test_a_pinned_log_is_not_evicted() -> None:
    outputs = Outputs(10_000)
    first, second = filled(outputs, 40), filled(outputs, 40)
    first.pinned = True
    filled(outputs, 80)
    assert kept_range(first) == (0, 40)
    assert kept_range(second) == (40, 40)


def test_a_log_that_exceeds_the_budget_alone_loses_its_beginning() -> None:
    outputs = Outputs(10_000)
    log = filled(outputs, *[1] * 200)
    assert log.kept_to == 200
    assert 150 < log.kept_from < 190
    assert log.rows(log.kept_from, 200) == hidden(log.kept_from, 200 - log.kept_from).tobytes()


def test_a_step_larger_than_the_budget_is_not_kept() -> None:
    outputs = Outputs(1000)
    log = filled(outputs, 100)
    assert kept_range(log) == (100, 100)
    assert outputs.used_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["append", "cut", "gap", "drop"]), st.integers(1, 30)), max_size=60))
def test_the_budget_is_kept_and_every_byte_is_counted(actions: list[tuple[int, str, int]]) -> None:
    outputs = Outputs(6000)
    logs = [outputs.open("f32") for _ in range(4)]
    for which, action, size in actions:
        log = logs[which]
        if action == "append":
            outputs.append(log, log.kept_to, size, encoded(log.kept_to, size))
        elif action == "gap":
            outputs.append(log, log.kept_to + size, size, encoded(log.kept_to + size, size))
        elif action == "cut":
            outputs.cut(log, max(0, log.kept_to - size))
        else:
            outputs.drop(log)
            logs[which] = outputs.open("f32")
        assert outputs.used_bytes <= 6000
        assert outputs.used_bytes == sum(part.nbytes + 160 for log in logs for part in log.parts)
        for log in logs:
            assert 0 <= log.kept_from <= log.kept_to
            if log.parts:
                assert np.frombuffer(log.rows(*kept_range(log)), np.float32)[::WIDTH].tolist() == list(range(*kept_range(log)))
    for log in logs:
        outputs.drop(log)
    assert outputs.used_bytes == 0
