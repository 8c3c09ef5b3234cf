"""The verdict of a soak run, and its short form with real daemons."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from run import Life


def life(
    memory_mb_h: float,
    descriptors_h: float,
    *,
    minutes: int = 60,
    answers_s: float = 1.0,
    split_mb: float = 0.0,
    counted: bool = True,
) -> Life:
    """Make a life of a daemon that first computes a split in minute 50, which takes `split_mb`, `counted` as reserved or not."""
    made = Life("h1")
    for second in range(0, 60 * minutes, 2):
        hours = second / 3600
        warm_up = 150e6 * min(1.0, second / 300)
        wave = 3e6 * ((second // 2) % 7 - 3)
        split = 1e6 * split_mb * (second > 3000)
        memory = int(400e6 + warm_up + wave + 1e6 * memory_mb_h * hours + split)
        descriptors = int(40 + second % 3 + descriptors_h * hours)
        made.add(1000.0 + second, int(answers_s * second), memory, descriptors, int(3e8 + counted * split))
    return made


def test_a_flat_life_passes_in_spite_of_warm_up_and_noise() -> None:
    row, problems = life(0.0, 0.0).verdict()
    assert problems == []
    assert row.startswith("h1: 3598 s, 1800 samples: memory 550 MB")


@pytest.mark.parametrize(("memory", "descriptors", "what"), [(60.0, 0.0, "memory"), (0.0, 12.0, "descriptors")])
def test_a_life_that_grows_is_found(memory: float, descriptors: float, what: str) -> None:
    _, problems = life(memory, descriptors).verdict()
    assert [problem.split(" grows")[0] for problem in problems] == [f"h1: {what}"]


@pytest.mark.parametrize("counted", [True, False])
def test_memory_that_the_daemon_counts_as_reserved_is_not_growth(counted: bool) -> None:
    row, problems = life(0.0, 0.0, split_mb=40.0, counted=counted).verdict()
    assert len(problems) == (not counted)
    assert ("+40.0 MB reserved" in row) is counted


def test_a_life_of_few_answers_is_not_fitted() -> None:
    row, problems = life(20.0, 0.0, minutes=30, answers_s=0.5).verdict()
    assert "at the end" in row
    assert problems == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_minutes_of_three_daemons_with_a_restart() -> None:
    command = [sys.executable, "-P", str(Path(__file__).parent / "run.py"), "--minutes", "2", "--restart-every", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
