"""`meshd up` as a process: how it starts, what it prints and how it ends."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from meshd.state import read_holder


@contextmanager
def up(state: Path, cache: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Run a daemon inside the block and kill it at the end. Its standard streams are pipes."""
    command = [sys.executable, "-P", "-m", "meshd", "up", "--state", str(state), "--cache", str(cache), "--threads", "1"]
    command += ["--api", "127.0.0.1:0", "--link", "127.0.0.1:0", "--discovery", "static", *flags]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def startup_output(process: subprocess.Popen[str]) -> str:
    """Return what the daemon prints up to the line with the command for the next device, the last line of its start."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "next device" in line:
            break
    return "".join(lines)


def join_code(state: Path) -> str:
    command = [sys.executable, "-P", "-m", "meshd", "key", "show", "--state", str(state)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_the_first_start_says_how_the_next_device_joins(tmp_path: Path, shared_cache: Path) -> None:
    with up(tmp_path / "a", shared_cache) as first:
        text = startup_output(first)
        assert "meshd invite" in text
        assert join_code(tmp_path / "a") not in text
        holder = read_holder(tmp_path / "a")
        assert holder is not None
        assert f"http://{holder.api}/v1" in text
    with up(tmp_path / "a", shared_cache) as again:
        assert "meshd invite" in startup_output(again)


def test_keys_of_the_command_line_are_not_among_the_arguments_of_the_running_daemon(tmp_path: Path, shared_cache: Path) -> None:
    code = subprocess.run(
        [sys.executable, "-P", "-m", "meshd", "key", "new", "--state", str(tmp_path / "other")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()
    secrets = (f"--key={code}", "--api-key", "a-secret", "--mqtt", "mqtt://me:a-password@127.0.0.1:9", "--discovery", "mqtt")
    with up(tmp_path / "a", shared_cache, *secrets, "--name", "desk") as process:
        startup_output(process)
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        assert "desk" in arguments
        assert not any(secret in argument for argument in arguments for secret in (code, "a-secret", "a-password"))
        holder = read_holder(tmp_path / "a")
        assert holder is not None
        assert holder.pid == process.pid
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"http://{holder.api}/v1/models", timeout=10)
        request = Request(f"http://{holder.api}/mesh/v1/self", headers={"Authorization": "Bearer a-secret"})
        with urlopen(request, timeout=10) as answer:
            assert json.load(answer)["mqtt"]["broker"] == "mqtt://me@127.0.0.1:9"
    assert join_code(tmp_path / "a") == code


def test_a_join_code_is_read_from_standard_input(tmp_path: Path, shared_cache: Path) -> None:
    with up(tmp_path / "a", shared_cache) as first:
        startup_output(first)
        code = join_code(tmp_path / "a")
    with up(tmp_path / "b", shared_cache, "--key", "-", "--stop-with-stdin") as second:
        assert second.stdin is not None
        second.stdin.write(f"{code}\n")
        second.stdin.flush()
        startup_output(second)
        second.stdin.close()
        assert second.wait(10) == 0
    assert join_code(tmp_path / "b") == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_daemon_soon_and_cleanly(tmp_path: Path, shared_cache: Path, number: signal.Signals) -> None:
    with up(tmp_path / "a", shared_cache) as process:
        startup_output(process)
        asked = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert time.monotonic() - asked < 5
        assert process.returncode == 0
        assert "Traceback" not in err
    assert read_holder(tmp_path / "a") is None


def test_with_stop_with_stdin_the_daemon_ends_when_its_standard_input_closes(tmp_path: Path, shared_cache: Path) -> None:
    with up(tmp_path / "a", shared_cache, "--stop-with-stdin") as process:
        startup_output(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def test_a_daemon_that_still_measures_its_device_stops_at_once(tmp_path: Path) -> None:
    with up(tmp_path / "a", tmp_path / "cache") as process:
        assert process.stderr is not None
        while "measuring" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_an_api_key_is_required_once_it_was_made(tmp_path: Path, shared_cache: Path) -> None:
    def meshd(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "meshd", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    state = ("--state", str(tmp_path / "a"))
    key = meshd("key", "api", *state).stdout.strip()
    with up(tmp_path / "a", shared_cache) as process:
        startup_output(process)
        holder = read_holder(tmp_path / "a")
        assert holder is not None
        assert meshd("status", *state).returncode == 0
        stranger = ("--api", f"http://{holder.api}", "--state", str(tmp_path / "elsewhere"))
        refused = meshd("status", *stranger)
        assert refused.returncode == 1
        assert "MESHD_API_KEY" in refused.stderr
        assert meshd("status", *stranger, "--api-key", key).returncode == 0
