"""Ctrl-C and SIGTERM end work within a second, even work in a thread that does not look for it."""

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from meshd.cli.support.interrupt import run_interruptibly

WORK = """
import asyncio, sys, time
from meshd.cli import INTERRUPTED
from meshd.cli.support.interrupt import run_interruptibly

async def stubborn():
    print("at work", flush=True)
    await asyncio.to_thread(time.sleep, 60)

async def orderly():
    print("at work", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("kept", flush=True)

try:
    run_interruptibly(stubborn() if sys.argv[1] == "stubborn" else orderly())
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)
"""


def test_the_handlers_of_before_are_set_again() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert run_interruptibly(asyncio.sleep(0, "done")) == "done"
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("work", "signals", "status"),
    [
        ("orderly", [signal.SIGINT], 130),
        ("orderly", [signal.SIGTERM], 143),
        ("stubborn", [signal.SIGINT], 130),
        ("stubborn", [signal.SIGTERM], 143),
        ("stubborn", [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_a_signal_ends_the_work(work: str, signals: list[signal.Signals], status: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WORK, work], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    out, _ = process.communicate(timeout=20)  # the work itself takes 60 s
    assert process.returncode == status
    assert out == ("kept\n" if work == "orderly" else "")
