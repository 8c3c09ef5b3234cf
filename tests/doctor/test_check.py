"""The runner: checks run at once, each ends in time, and none takes the others with it."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshd.agents.cluster_service import CheckResult, CheckStep
from meshd.doctor import CHECKS
from meshd.doctor.check import Check, Context, Found, Runner, ok, run_command
from meshd.errors import ConfigError


def _good(context: Context) -> Found:
    yield ok("good", "fine")


async def _slow(context: Context) -> Found:
    await asyncio.sleep(60)
    return []


def _fails(context: Context) -> Found:
    raise ZeroDivisionError("oops")


def _disk_fails(context: Context) -> Found:
    raise OSError(5, "Input/output error", "/mnt/disk")


def _refuses(context: Context) -> Found:
    raise ConfigError("that can't be", hint="type this")


async def _run(runner: Runner, context: Context) -> list[CheckStep]:
    return [step async for step in runner.run(context)]


async def test_each_check_gives_its_results_whatever_the_others_do(context: Context) -> None:
    checks = (
        Check("good", _good),
        Check("slow", _slow, 0.05),
        Check("fails", _fails),
        Check("disk", _disk_fails),
        Check("refuses", _refuses),
    )
    steps = await _run(Runner(checks), context)
    assert [(step.done, step.total) for step in steps] == [(number, 5) for number in range(1, 6)]
    results: dict[str, CheckResult] = {step.check: step.results[0] for step in steps}
    assert {name: result.status.value for name, result in results.items()} == {
        "good": "ok",
        "slow": "unchecked",
        "fails": "unchecked",
        "disk": "unchecked",
        "refuses": "wrong",
    }
    assert "no result within 0.05 s" in results["slow"].found
    assert "ZeroDivisionError" in results["fails"].found
    assert "/mnt/disk: Input/output error" in results["disk"].found
    assert results["refuses"].mend == "type this"


async def test_a_check_that_hangs_is_left_and_not_started_again(context: Context) -> None:
    release, started = threading.Event(), []

    def hang(context: Context) -> Iterator[CheckResult]:
        started.append(threading.get_ident())
        release.wait(30)
        yield ok("hang", "late")

    runner = Runner((Check("hang", hang, 0.1), Check("good", _good)))
    first, again = await _run(runner, context), await _run(runner, context)
    assert {step.check for step in first} == {step.check for step in again} == {"hang", "good"}
    assert "still hangs" in next(step for step in again if step.check == "hang").results[0].found
    assert len(started) == 1
    release.set()
    while runner._hanging:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    [step] = [step for step in await _run(runner, context) if step.check == "hang"]
    assert step.results[0].found == "late"


async def test_who_leaves_early_ends_the_checks(context: Context) -> None:
    ended = asyncio.Event()

    async def waits(context: Context) -> Found:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return []

    runner = Runner((Check("good", _good), Check("waits", waits)))
    steps = runner.run(context)
    assert (await anext(steps)).check == "good"
    assert runner.running
    await steps.aclose()
    assert ended.is_set()
    assert not runner.running


def test_ids_of_checks_are_unique() -> None:
    assert len({check.id for check in CHECKS}) == len(CHECKS)


def test_every_id_has_its_place_in_the_output() -> None:
    from meshd.cli.doctor import _ORDER

    groups = {"disks", "backend"}
    assert {check.id for check in CHECKS} - groups <= set(_ORDER)


def test_the_page_has_every_check() -> None:
    from meshd.cli.doctor import _ORDER

    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    rows = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])}
    assert rows - {"ok", "warning", "wrong", "unchecked"} == {*_ORDER, "daemon", "terminal"}


def test_a_command_that_hangs_or_is_missing_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshd.doctor import check

    monkeypatch.setattr(check, "COMMAND_S", 0.1)
    began = time.monotonic()
    assert run_command(("sleep", "30")) is None
    assert time.monotonic() - began < 10
    assert run_command(("no-such-command-here",)) is None
    done: Any = run_command(("sh", "-c", "echo out; echo err >&2; exit 3"))
    assert done is None or (done.status, done.text) == (3, "out\nerr\n")
