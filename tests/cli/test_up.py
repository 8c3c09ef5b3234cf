"""`meshd up` without a daemon: wrong settings, what it prints, and signals. `tests/cluster/test_up.py` runs it whole."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from subprocess import CompletedProcess

import pytest

from in_process.peer_events import CAPABILITY
from meshd.agents.device.memory import MemoryBudget
from meshd.agents.device.probe import ProbeResult
from meshd.cli.up import _print_ready, _print_waiting, _Stopping
from meshd.daemon.daemon import DaemonInfo
from meshd.types import PeerId

Meshd = Callable[..., CompletedProcess[str]]


def test_an_unguarded_api_is_refused_in_one_line(meshd: Meshd) -> None:
    outcome = meshd("up", "--api", "0.0.0.0:0")
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "without an API key" in outcome.stderr
    assert "meshd key api" in outcome.stderr


def test_a_wrong_setting_is_refused_with_its_flag(meshd: Meshd) -> None:
    outcome = meshd("up", "--threads", "many")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("meshd: setting threads (from flag --threads) is wrong")


def test_quant_applies_to_every_model_and_refuses_one_that_can_not_be_quantised(meshd: Meshd) -> None:
    outcome = meshd("up", "--quant", "q4", "--model", "hf:org/name", "--model", "smollm2:135m")
    assert outcome.returncode == 2
    assert "smollm2:135m can't be quantised to q4" in outcome.stderr


def _info(*, new_cluster: bool, cached: bool = False) -> DaemonInfo:
    memory = MemoryBudget(total_bytes=8, free_bytes=4, bound_by="the system")
    return DaemonInfo(
        name="desk", peer=PeerId("k3j2x9d1" + "a" * 44), cluster="bufmutkh", join_code="mesh-CODE", new_cluster=new_cluster,
        api="http://127.0.0.1:6374", link="0.0.0.0:6375",
        probe=ProbeResult(capability=CAPABILITY, memory=memory, cores=2, trials=(), cached=cached, elapsed_s=12.0),
    )  # fmt: skip


def test_on_a_terminal_a_new_cluster_prints_the_command_for_the_next_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _print_ready(_info(new_cluster=True))
    lines = capsys.readouterr().out.splitlines()
    assert "desk (k3j2x9d1) is up, in cluster bufmutkh" in lines[0]
    assert lines[1].split() == ["API", "http://127.0.0.1:6374/v1"]
    assert lines[3].endswith("4 B free (measured in 12.0 s)")
    assert lines[4] == "  on the next device: meshd up --key mesh-CODE"


def test_the_join_code_does_not_get_into_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    _print_ready(_info(new_cluster=True))
    assert "mesh-CODE" not in capsys.readouterr().out


def test_the_join_code_of_a_known_cluster_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _print_ready(_info(new_cluster=False, cached=True))
    out = capsys.readouterr().out
    assert "mesh-CODE" not in out
    assert "as measured before" in out
    assert out.endswith("on the next device: see `meshd invite`\n")


def test_a_closed_output_does_not_stop_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", out)
    _print_waiting("1 session left")
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        out.close()


@pytest.fixture
async def daemon() -> AsyncIterator["asyncio.Future[None]"]:
    """A task that runs until it is cancelled. Signal handlers are removed after the test."""
    task = asyncio.ensure_future(asyncio.sleep(60))
    yield task
    task.cancel()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_signal_cancels_a_daemon_that_is_still_starting(daemon: "asyncio.Future[None]") -> None:
    stopping = _Stopping()
    stopping.watch(daemon, stdin=False)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(daemon, 5)
    assert stopping.asked.is_set()


async def test_a_signal_lets_a_running_daemon_shut_down_in_order(daemon: "asyncio.Future[None]") -> None:
    stopping = _Stopping()
    stopping.can_wait = True
    stopping.watch(daemon, stdin=False)
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.wait_for(stopping.asked.wait(), 5)
    await asyncio.sleep(0)
    assert not daemon.done()


async def test_a_signal_that_was_ignored_stays_ignored(daemon: "asyncio.Future[None]") -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _Stopping().watch(daemon, stdin=False)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


SECOND_SIGNAL = """
import asyncio, os, signal
from meshd.cli.up import _Stopping

async def main():
    stopping = _Stopping()
    stopping.can_wait = True
    stopping.watch(asyncio.ensure_future(asyncio.sleep(60)), stdin=False)
    os.kill(os.getpid(), signal.SIGTERM)
    await stopping.asked.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_second_signal_exits_at_once() -> None:
    ended = subprocess.run([sys.executable, "-P", "-c", SECOND_SIGNAL], capture_output=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM


def test_a_thread_that_does_not_end_does_not_keep_the_process() -> None:
    script = (
        "import asyncio, time; from meshd.cli.up import _ending_within\n"
        "async def daemon(): asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)\n"
        "with _ending_within(0.2) as leave, asyncio.Runner() as runner:\n"
        "    runner.run(daemon())\n"
        "    leave(7)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=20, check=False).returncode == 7
